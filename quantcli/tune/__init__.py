"""Algorithms that make a quantized model better: one per file, each usable alone."""
