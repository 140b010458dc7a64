"""Measurements; each script here is run by hand and prints a table."""
