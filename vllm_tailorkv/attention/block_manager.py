"""Our block manager: vLLM's, with one rule more."""

from typing import ClassVar

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager


class TailorKVBlockManager(FullAttentionManager):
    """Blocks of tokens whose host and derived pages share one block id.

    The invariant: a block is shared as a whole or not at all. The derived page is a pure
    function of the host page, and both are addressed by the same id, so whatever vLLM does
    with whole blocks (prefix hits, eviction, preemption) holds for both tiers at once. A
    hit on part of a block would be continued in a copy, and vLLM copies its own pages only;
    so fine-grained lookups are off.
    """

    supports_fine_grained_hash_lookup: ClassVar[bool] = False
