"""Passes over the data: statistics at units and layers, in parts, in smaller batches, in several processes."""
