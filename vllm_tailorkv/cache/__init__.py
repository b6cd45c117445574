"""The two tiers of the cache as tensors, and how much of each there is."""
