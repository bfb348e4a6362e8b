"""Run tests, checks and benchmarks within a given time: `benchmarks/run_all`."""
