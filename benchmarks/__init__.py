"""Benchmarks of the ops and of whole steps, on a GPU or by counts without one; README.md says how and against whom."""
