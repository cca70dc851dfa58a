"""What `pxcompress inspect` shows: groups and their costs, and whether relevance is conserved."""
