"""The results of `pxcompress inspect`: groups and their costs, and whether relevance is conserved."""
