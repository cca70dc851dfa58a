"""Passes over the data that collect statistics of units and layers, in small batches and in several processes."""
