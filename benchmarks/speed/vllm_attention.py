"""vLLM's own CPU attention on a cache of its own, as its backend CPU_ATTN calls it."""

import math
from collections.abc import Sequence

import torch
from vllm import _custom_ops as vllm_ops
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from speed.inputs import Inputs
from speed.pages import MIN_ROTATED_BYTES, PageSet
from speed.shapes import BLOCK_SIZE, DTYPE, Shape


class VllmCache:
    """The cache of one layer, laid out as vLLM lays it out.

    Args:
        kv_cache_dtype: of vLLM: `auto` (the model's dtype) or `fp8`; scales are 1, as they are
            for a checkpoint that brings none.

    Raises:
        NotImplementedError: vLLM has no such path on this machine.
    """

    def __init__(self, shape: Shape, num_blocks: int, kv_cache_dtype: str) -> None:
        self.kv_cache_dtype = kv_cache_dtype
        self.isa = _get_attn_isa(DTYPE, BLOCK_SIZE, shape.head_size, kv_cache_dtype)
        if self.isa == "amx" and not torch.cpu._init_amx():
            raise SystemExit("this system does not let processes use AMX")
        dtype = DTYPE if kv_cache_dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[kv_cache_dtype]
        pages = torch.zeros(
            num_blocks, shape.kv_heads, 2 * BLOCK_SIZE, shape.head_size, dtype=dtype
        )
        self.key, self.value = pages.chunk(2, dim=2)

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Write K and V, [T, Hk, d], into slots [T]."""
        vllm_ops.cpu_attn_reshape_and_cache(
            key, value, self.key, self.value, slots, self.isa, kv_cache_dtype=self.kv_cache_dtype
        )

    def schedule(
        self, shape: Shape, seq_lens: torch.Tensor, query_start_loc: torch.Tensor
    ) -> torch.Tensor:
        """What vLLM's backend prepares once a step for all layers."""
        return vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_size,
            seq_lens=seq_lens,
            dtype=DTYPE,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
            kv_cache_dtype=self.kv_cache_dtype,
        )

    def attend(
        self,
        output: torch.Tensor,
        query: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        schedule: torch.Tensor,
    ) -> None:
        """Causal attention over all tokens; query and output are [T, H, d]."""
        vllm_ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self.key,
            value_cache=self.value,
            output=output,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            scale=query.shape[-1] ** -0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=block_table,
            softcap=0.0,
            scheduler_metadata=schedule,
            s_aux=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class VllmStep:
    """vLLM's decode step over the same tokens as ours, each set of pages copied to its cache.

    Where vLLM uses its `vec` layout it could read our pages, and was as fast there (19.65 and
    19.61 ms at 32k, Llama-3.1-8B shape, one thread of a Zen 4); but with AMX its layout is another.
    """

    def __init__(self, inputs: Inputs, sets: Sequence[PageSet], kv_cache_dtype: str) -> None:
        self.inputs = inputs
        self.output = torch.empty_like(inputs.query)
        self.starts = torch.arange(inputs.batch + 1, dtype=torch.int32)
        num_blocks = sets[0].block_table.numel()
        first = VllmCache(inputs.shape, num_blocks, kv_cache_dtype)
        # vLLM reads all of it: few sets are more than the processor's caches hold.
        count = math.ceil(MIN_ROTATED_BYTES / (2 * first.key.numel() * first.key.itemsize))
        self.caches = [first]
        self.caches += [
            VllmCache(inputs.shape, num_blocks, kv_cache_dtype) for _ in range(count - 1)
        ]
        self.tables = []
        for i, cache in enumerate(self.caches):
            pages = sets[i % len(sets)]
            self._copy(pages, cache)
            self.tables.append(pages.block_table)
        self.schedule = first.schedule(inputs.shape, inputs.seq_lens, self.starts)

    def _copy(self, pages: PageSet, cache: VllmCache) -> None:
        slots = torch.arange(BLOCK_SIZE)
        for block in range(len(pages.host.key)):
            cache.write(
                pages.host.key[block].transpose(0, 1).contiguous(),
                pages.host.value[block].transpose(0, 1).contiguous(),
                slots + block * BLOCK_SIZE,
            )

    @property
    def isa(self) -> str:
        """vLLM's name for the layout and code path."""
        return self.caches[0].isa

    def run(self, number: int) -> None:
        """The step, on the set of pages whose turn it is."""
        turn = number % len(self.caches)
        self.caches[turn].attend(
            self.output,
            self.inputs.query,
            self.tables[turn],
            self.inputs.seq_lens,
            self.starts,
            self.schedule,
        )
