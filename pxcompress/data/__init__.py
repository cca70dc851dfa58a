"""Labelled images: where they come from, and their five disjoint roles."""

from pxcompress.data.samples import Source
from pxcompress.data.sources import open_source
from pxcompress.data.splits import load_splits, training_batches

__all__ = ["Source", "load_splits", "open_source", "training_batches"]
