"""The folder that a run leaves: how it is written, what is in it, and what is added to it later."""
