"""What the dense and the pruned model look at, side by side."""
