"""The backend's name and where its class lies. Imports nothing."""

NAME = "TAILORKV"
CLASS_PATH = "vllm_tailorkv.attention.backend.TailorKVBackend"
LOGGER = "vllm.tailorkv"
"""Below vLLM's own logger, so that its level, format and process names are ours too."""

OTHER_BACKEND = "leave --attention-backend out to use vLLM's own"
"""The remedy of last resort."""
