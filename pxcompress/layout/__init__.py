"""Where units lie: rows of tensors and weights, and the layers that read them."""
