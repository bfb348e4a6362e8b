"""Turn results/*/*.json into RESULTS.md and the README's part."""
