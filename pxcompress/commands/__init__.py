"""What `pxcompress` can be told to do: one command a file, put together in `cli`."""
