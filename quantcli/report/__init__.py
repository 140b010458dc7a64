"""The report of one conversion: a single HTML page that needs no network."""
