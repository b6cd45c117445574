"""Other systems that serve the same model on the same processor."""
