"""`benchmarks/run_all`: tests, checks and benchmarks within a given time."""
