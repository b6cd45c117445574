"""Our block manager: vLLM's, with one rule more."""

from typing import Any, ClassVar

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_tailorkv.attention import metrics
from vllm_tailorkv.attention.meters import meter

TIERS = ("host", "derived")


class TailorKVBlockManager(FullAttentionManager):
    """Blocks of tokens whose host and derived pages share one block id.

    The invariant: a block is shared as a whole or not at all. The derived page is a pure
    function of the host page, and both are addressed by the same id, so whatever vLLM does
    with whole blocks (prefix hits, eviction, preemption) holds for both tiers at once. A
    hit on part of a block would be continued in a copy, and vLLM copies its own pages only;
    so fine-grained lookups are off.
    """

    supports_fine_grained_hash_lookup: ClassVar[bool] = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # One block is vLLM's null block and holds no tokens.
        self._num_blocks: int = self.block_pool.num_gpu_blocks - 1
        self._used = [meter(metrics.CACHE_BLOCKS_USED, tier) for tier in TIERS]
        for tier in TIERS:
            meter(metrics.CACHE_BLOCKS, tier).set(self._num_blocks)
        self._tell_use()

    def new_step_starts(self) -> None:
        """Called once a step."""
        super().new_step_starts()
        self._tell_use()

    def free(self, request_id: str) -> None:
        """Called for a request that ends or is preempted."""
        super().free(request_id)
        self._tell_use()

    def _tell_use(self) -> None:
        used = self._num_blocks - self.block_pool.get_num_free_blocks()
        for one in self._used:
            one.set(used)
