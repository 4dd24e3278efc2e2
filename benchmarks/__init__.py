"""Benchmarks: what a step costs. Run as modules from the repository root; results stand in ``benchmarks/results``."""
