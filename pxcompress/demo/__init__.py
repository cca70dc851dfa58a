"""Data sets and nets that come with the package, for demonstrations, tests and benchmarks; no user's model needs them.

The product reaches them by name alone, through the registry in `pxcompress.data.embedded`.
"""
