"""Benchmarks of cost and memory, compared with the cost expected of the algorithms."""
