"""Integers without a runtime: C source, parameters as a header, and whether they are what the executor computes."""
