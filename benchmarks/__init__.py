"""Measurements of cost and memory, held against what the algorithms must cost."""
