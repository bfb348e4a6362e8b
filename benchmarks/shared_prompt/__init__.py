"""A forward with shared prompts beside one with a row for each completion: time and peak memory."""
