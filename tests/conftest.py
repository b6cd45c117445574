"""Settings for all tests."""

import os

import sanitize
import torch
from hypothesis import settings

# A timing never fails a test: machines that run these may be busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Without a GPU, Triton interprets its kernels. It decides so when it is imported: do it first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Before a test, or another conftest.py, loads the usual ones.
if sanitize.active():
    sanitize.load_ops()
