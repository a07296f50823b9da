"""Benchmarks: check first, then measure against the alternative in the same process, and write JSON."""
