"""`vllm-tailorkv doctor`: what is installed, what will run and why, what is missing."""
