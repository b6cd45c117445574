"""A demonstration without downloads: a tiny model that truly retrieves, served by vLLM.

Run it with `vllm-tailorkv demo`. Nothing here imports vLLM.
"""
