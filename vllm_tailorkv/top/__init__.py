"""`vllm-tailorkv top`: a server's metrics as a live screen."""
