"""Benchmarks of time and memory, compared with the expected cost of the algorithms."""
