"""The arithmetic of quantization: numpy only, no graph, no framework. Equations: docs/arithmetic.md."""
