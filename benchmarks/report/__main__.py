"""Write RESULTS.md and the README's numbers."""

import sys

from benchmarks.report.document import main

sys.exit(main())
