"""Hooks run a float model and hand every asked tensor to its observer."""
