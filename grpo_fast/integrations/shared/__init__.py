"""Code that several adapters use.

`call` computes a host's loss and metrics, `options` reads its configuration, `packages` its version,
`responses` its lists of responses, and `model_head` the head of its model. `sharing` has the values of the
option `share_prompts`. A host is the trainer that an adapter serves.
"""
