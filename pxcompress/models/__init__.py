"""Models: loaded with their weights, written in plain layers, trained here where there is nothing to load."""
