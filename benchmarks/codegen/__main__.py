"""Print or save what every kernel compiles to."""

from benchmarks.codegen.reports import main

main()
