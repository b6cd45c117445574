"""TailorKV as a vLLM attention backend: specs, metadata, implementation."""
