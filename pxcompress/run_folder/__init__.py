"""The folder that a run writes: how it is written, what is in it, and what is added to it later."""
