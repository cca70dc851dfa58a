"""Turns scores and costs into a plan: which units are removed."""
