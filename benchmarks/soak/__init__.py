"""Soak and chaos of a real server: what `benchmarks/soak.py` is made of."""
