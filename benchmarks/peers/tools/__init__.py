"""One script for each of the other tools; each runs in an environment of its own, that has what its ``.txt`` names."""
