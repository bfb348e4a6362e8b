"""Measure shared prompts."""

import sys

from benchmarks.shared_prompt.rows import main

sys.exit(main())
