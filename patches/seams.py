"""The vLLM versions that are known, and what differs between them.

A difference between versions is told here and nowhere else: a patch whose target, or what the
target takes, changed has one record for each of these ranges. What could be written so that it is
right in all of them needs no place here.
"""

V0_32 = ">=0.32.0,<0.33"
"""`get_kv_cache_configs` groups the layers itself."""
V0_33 = ">=0.33.0,<0.34"
"""`get_kv_cache_configs` is given the groups, as a fourth argument."""

ALL = ">=0.32.0,<0.34"
"""Every version that is known: the ranges above, without a gap."""

VLLM = "0.32.0"
"""The version to install: the one that the engine tests run with."""
