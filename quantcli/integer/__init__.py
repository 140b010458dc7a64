"""The integer-only executor: a quantized model and its sidecar, run with integers alone.

It knows docs/arithmetic.md and docs/sidecar.md and nothing of how the numbers were decided: what it computes, a stranger can.
"""
