"""Commands that tell their own result keep to themselves what libraries say beside it."""

import logging
import os
import warnings

_INHERITED = "_TAILORKV_QUIET"
"""The variable that has the processes that this one starts be quiet from their beginning."""


def quiet() -> None:
    """Let vLLM and other libraries tell errors alone, in this process and those that it starts.

    What the user has set in the environment stays.
    """
    os.environ[_INHERITED] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    # Warnings of torch's C++, and of what is built on it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # The hub's client tells every retry. It sets its log up by this, when it is imported.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Some of vLLM is imported before it sets its log up.
    for library in ("vllm", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def stay_quiet() -> None:
    """In a process that a quiet one has started: before anything is imported there that speaks."""
    if _INHERITED in os.environ:
        quiet()
