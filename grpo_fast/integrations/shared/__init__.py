"""Code that several adapters use.

`call` computes a host's loss and metrics, `options` reads its configuration, `packages` its version,
`responses` its lists of responses, and `model_head` the head of its model. A host is the trainer that an
adapter serves.
"""
