"""Benchmarks: one command for each number, with its baseline in the same run. See docs/benchmarks.md."""
