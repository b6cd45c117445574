"""Commands keep libraries quiet, also those that are imported later and set their logs up then."""

import subprocess
import sys

PROGRAM = """
import logging
from vllm_tailorkv.quiet import quiet
quiet()
import huggingface_hub.utils.logging
print(logging.getLogger("huggingface_hub.utils").getEffectiveLevel() == logging.ERROR)
"""


def test_the_hubs_client_tells_errors_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"]
