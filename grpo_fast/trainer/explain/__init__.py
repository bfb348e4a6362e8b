"""`grpo-fast explain`: one real training step, stage by stage, as a page or in a terminal.

`capture` makes a step with the parts of the trainer and returns its record, `numbers` computes everything
that is shown from a record by the functions of grpo_fast, and `page` and `text` show it.
"""
