"""What the adapters share: a call of a loss in a host's terms, options, packages, the model's head."""
