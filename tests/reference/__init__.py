"""Slow, obvious float64 oracles, one paper a file: the truth the fast methods are tested against."""
