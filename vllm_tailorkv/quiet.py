"""Commands that tell their own result keep to themselves what libraries say beside it."""

import logging
import os
import warnings


def quiet() -> None:
    """Let vLLM and other libraries tell errors alone, in this process and those that it starts.

    What the user has set in the environment stays.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    # The hub's client tells every retry. It sets its log up by this, when it is imported.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Some of vLLM is imported before it sets its log up.
    for library in ("vllm", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
