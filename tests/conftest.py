"""Settings for all tests."""

import os

import torch
from hypothesis import settings

# A timing never fails a test: machines that run these may be busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Without a GPU, Triton interprets its kernels. It decides so when it is imported: do it first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
