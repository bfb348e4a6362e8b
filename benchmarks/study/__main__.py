"""Make the study."""

import sys

from benchmarks.study.command import main

sys.exit(main())
