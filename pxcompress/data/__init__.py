"""Labelled data: where they come from, and their five disjoint roles."""

from pxcompress.data.class_order import match_class_order
from pxcompress.data.embedded import EMBEDDED
from pxcompress.data.samples import Source
from pxcompress.data.sources import (
    check_classes,
    keep_for_certificates,
    open_images,
    open_source,
    read_files,
    restrict_classes,
)
from pxcompress.data.splits import are_known_by_content, load_splits, training_batches

__all__ = [
    "EMBEDDED",
    "Source",
    "are_known_by_content",
    "check_classes",
    "keep_for_certificates",
    "load_splits",
    "match_class_order",
    "open_images",
    "open_source",
    "read_files",
    "restrict_classes",
    "training_batches",
]
