"""Look at data through a running float model: readers, observers, and the statistics they leave. Knows no quantization."""
