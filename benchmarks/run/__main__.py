"""Run tests and benchmarks: `benchmarks/run_all`."""

import sys

from benchmarks.run.runner import main

sys.exit(main())
