"""Times and memory that are computed, not measured."""
