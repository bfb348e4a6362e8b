"""Compile `kernels/on_chip.py` for GPU machines whose Triton is older than 3.8."""

import sys

from benchmarks.on_chip.build import main

sys.exit(main())
