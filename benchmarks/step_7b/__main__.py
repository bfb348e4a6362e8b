"""Measure one GRPO update of a 7B model."""

import sys

from benchmarks.step_7b.rows import main

sys.exit(main())
