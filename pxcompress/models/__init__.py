"""Loads models with their weights, rewrites them in plain layers, and trains them if there are no weights."""
