"""Benchmarks: each module prints a comparison of its own, `python -m bench.NAME --help`."""
