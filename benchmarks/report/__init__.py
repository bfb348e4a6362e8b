"""From results/*/*.json to RESULTS.md and the README."""
