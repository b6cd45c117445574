"""TailorKV for vLLM: long contexts in a fraction of the memory and decode bandwidth.

Importing this package imports neither torch nor vLLM; `vllm_tailorkv.plugin` does,
when vLLM loads it.
"""

__version__ = "0.1.0"
