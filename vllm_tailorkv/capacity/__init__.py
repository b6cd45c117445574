"""`vllm-tailorkv plan`: what fits into a machine's memory, and what a decode step reads."""
