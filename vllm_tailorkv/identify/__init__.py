"""`vllm-tailorkv identify`: which layers of a model are dense, measured through vLLM."""
