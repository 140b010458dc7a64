"""A whole zoo of models: converted, judged and reported, each in a process of its own."""
