"""Evaluate a quantized model: metrics, layer-by-layer comparison, latency."""
