"""Where units lie in tensors and weights, and which layers read them."""
