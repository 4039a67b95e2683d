"""One node at work: weights, KV caches, the forward pass, sampling, and the API over them."""
