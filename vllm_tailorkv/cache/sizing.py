"""How many bytes each tier takes, counted from the layouts. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_tailorkv.layout import GIB, DerivedKind, PageLayout


@dataclass(frozen=True)
class CacheSizing:
    """The bytes of one worker's cache.

    Args:
        dense_layers, sparse_layers: indices of this worker's layers of each kind.
        block_size: tokens of a block.
        full_bytes: bytes of a block's K and V, each once, all layers.
        host_bytes: bytes of a block's host regions, all layers.
        derived_bytes: bytes of a block's derived regions, all layers.
        other_bytes: bytes of a block's pages in layers that vLLM keeps to itself.
        split: whether the host regions lie in our own pool.
        num_kv_heads, head_size: of a layer on this worker.
    """

    dense_layers: tuple[int, ...]
    sparse_layers: tuple[int, ...]
    block_size: int
    full_bytes: int
    host_bytes: int
    derived_bytes: int
    other_bytes: int
    split: bool
    num_kv_heads: int
    head_size: int

    @property
    def pool_bytes(self) -> int:
        """Bytes of a block in vLLM's own pool."""
        host = 0 if self.split else self.host_bytes
        return host + self.derived_bytes + self.other_bytes

    def memory_for_vllm(self, available: int, host_pool: int | None) -> int:
        """The part of the memory that vLLM's pool may take.

        Args:
            available: bytes that vLLM found for its cache.
            host_pool: bytes of our host pool, or None for a share of `available`.
        """
        if not self.split:
            return available
        if host_pool is None:
            return available * self.pool_bytes // (self.pool_bytes + self.host_bytes)
        return min(available, host_pool // self.host_bytes * self.pool_bytes)

    def blocks_of_each(self, available: int, host_pool: int) -> tuple[int, int]:
        """Blocks that vLLM's pool and our host pool would hold, each by itself."""
        return available // self.pool_bytes, host_pool // self.host_bytes

    def describe(self, num_blocks: int, max_model_len: int) -> list[str]:
        """Lines for the start-up log. One block is vLLM's null block and holds no tokens."""
        block, tokens = self.block_size, (num_blocks - 1) * self.block_size
        full, host = self.full_bytes // block, self.host_bytes // block
        derived = self.derived_bytes // block
        where = "a pool of our own" if self.split else "vLLM's pages"
        rows = f", {host - full:,} of them K once more (key_rows)" if host > full else ""
        lines = [
            f"host tier: {host:,} bytes a token in {where}{rows}, "
            f"{num_blocks * self.host_bytes / GIB:.2f} GiB in all",
            f"derived tier: {derived:,} bytes a token ({derived / full:.1%} of K and V), "
            f"{num_blocks * self.derived_bytes / GIB:.2f} GiB in all",
        ]
        if self.other_bytes:
            lines.append(f"other layers: {self.other_bytes // block:,} bytes a token")
        lines.append(
            f"{num_blocks:,} blocks of {block} tokens: {tokens:,} tokens; one request may have "
            f"{min(tokens, max_model_len):,}"
        )
        return lines


def together(workers: Sequence[CacheSizing]) -> CacheSizing:
    """What the cache of an engine's workers takes, of which there is at least one.

    A block is a block of each of them. Its heads are those of the first.
    """

    def total(name: str) -> int:
        return sum(getattr(worker, name) for worker in workers)

    def layers(name: str) -> tuple[int, ...]:
        return tuple(sorted({layer for worker in workers for layer in getattr(worker, name)}))

    return replace(
        workers[0],
        dense_layers=layers("dense_layers"),
        sparse_layers=layers("sparse_layers"),
        full_bytes=total("full_bytes"),
        host_bytes=total("host_bytes"),
        derived_bytes=total("derived_bytes"),
        other_bytes=total("other_bytes"),
    )


def size_cache(layouts: Mapping[int, PageLayout], other_bytes: int, *, split: bool) -> CacheSizing:
    """Add up the pages of one worker.

    Args:
        layouts: the layout of each of our layers by index, at least one.
        other_bytes: bytes of a block in layers that vLLM keeps to itself.
        split: whether the host regions lie in our own pool.
    """
    dense = {i for i, layout in layouts.items() if layout.kind is DerivedKind.DENSE}
    first = next(iter(layouts.values()))
    return CacheSizing(
        dense_layers=tuple(sorted(dense)),
        sparse_layers=tuple(sorted(set(layouts) - dense)),
        block_size=first.block_size,
        full_bytes=sum(layout.full_bytes for layout in layouts.values()),
        host_bytes=sum(layout.host_bytes for layout in layouts.values()),
        derived_bytes=sum(layout.derived_bytes for layout in layouts.values()),
        other_bytes=other_bytes,
        split=split,
        num_kv_heads=first.num_kv_heads,
        head_size=first.head_size,
    )
