"""Explains decisions of the dense and the pruned model side by side, by heatmaps of relevance."""
