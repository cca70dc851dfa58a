"""Labelled data: where they come from, and their five disjoint roles."""

from pxcompress.data.samples import Source
from pxcompress.data.sources import open_source, restricted
from pxcompress.data.splits import load_splits, training_batches

__all__ = ["Source", "load_splits", "open_source", "restricted", "training_batches"]
