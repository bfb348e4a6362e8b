"""Measure on a real pretrained model."""

import sys

from benchmarks.real_model.command import main

sys.exit(main())
