"""One command a figure, its baseline in the same run: see docs/benchmarks.md."""
