"""A demonstration without downloads: a tiny model that truly retrieves, served by vLLM.

Run it with `python -m vllm_tailorkv.demo`. Nothing here imports vLLM.
"""
