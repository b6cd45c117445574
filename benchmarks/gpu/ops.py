"""Times of every op on a GPU, against its bandwidth limit and against full bf16 attention.

    python benchmarks/gpu/ops.py --json ops.jsonl
    python benchmarks/gpu/ops.py --device cpu --tiny      # rehearsal, under the interpreter

The bandwidths of the device and of the bus are measured first. One JSON object a line:

    what "machine"   GPU, driver, versions, bandwidths
    what "op"        op, by, context, batch, ms, limit_ms, share (limit_ms / ms), launch_ms
    what "layer"     layer, context, batch, ms, full_ms (the fastest full attention, `full_by`),
                     speedup, device_share (bytes on the device, of full bf16 K and V),
                     error (against the reference, at the shortest context)
    what "left out"  the cases that the time did not suffice for
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layers import (
    BLOCK_SIZE,
    CANDIDATES,
    CHANNELS,
    DTYPE,
    FULL_BYTES,
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    RESIDUAL,
    ROW_BYTES,
    SCALE,
    SELECTED,
    SINKS,
    Pool,
    Request,
    attend_sparse,
    find_op,
    make_host_bytes,
    make_pool,
    make_request,
    ranked_channels,
    rerank,
    run_dense_layer,
    run_sparse_layer,
    score,
    select,
    weigh,
)
from timing import Floors, Timer, measure_floors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vllm_tailorkv.cache.views import derived_pages
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.kernels import reference
from vllm_tailorkv.layout import DerivedKind, KeyLayout

ROTATED_BYTES = 512 << 20


@dataclass
class Run:
    """What one run measures, where it writes, and until when.

    turns: requests that take turns in one timing.
    """

    timer: Timer
    contexts: list[int]
    batches: list[int]
    pool_blocks: int
    turns: int
    deadline: float
    path: Path | None
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.timer.device

    def write(self, **record: Any) -> None:
        """Keep and print a record."""
        self.records.append(record)
        print(json.dumps(record), flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def cases(self) -> Iterator[tuple[int, int]]:
        """Contexts and batches, the small ones first, as long as time is left."""
        for context in self.contexts:
            for batch in self.batches:
                if time.monotonic() > self.deadline:
                    self.write(what="left out", context=context, batch=batch)
                else:
                    yield context, batch


def machine(run: Run, floors: Floors) -> dict[str, Any]:
    """What was measured on, and when."""
    record: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hbm_gb_s": round(floors.hbm / 1e9, 1),
        "pcie_gb_s": round(floors.pcie / 1e9, 1),
        "rehearsal": run.device.type == "cpu",
    }
    if run.device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        record["gpu"] = answer.strip() or torch.cuda.get_device_name()
    return record


def full_attention(run: Run, context: int, batch: int) -> tuple[str, float]:
    """The fastest of torch's attentions over full bf16 K and V on the device: name, ms."""
    bytes_of_one = batch * context * FULL_BYTES
    turns = max(1, min(4 * run.turns, ROTATED_BYTES // bytes_of_one))
    shape = (turns, batch, KV_HEADS, context, HEAD_SIZE)
    key = torch.randn(shape, device=run.device, dtype=DTYPE)
    value = torch.randn(shape, device=run.device, dtype=DTYPE)
    query = torch.randn(turns, batch, HEADS, 1, HEAD_SIZE, device=run.device, dtype=DTYPE)
    # The query heads of a KV head as its query tokens: the same sums, and K is read once.
    packed = query.view(turns, batch, KV_HEADS, HEADS // KV_HEADS, HEAD_SIZE)
    attend = partial(scaled_dot_product_attention, scale=SCALE)
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    if run.device.type == "cpu":
        backends = {"math": SDPBackend.MATH}
    times = {}
    for name, backend in backends.items():
        for form, q in (("heads", query), ("packed", packed)):
            gqa = {"enable_gqa": True} if form == "heads" else {}
            calls = [partial(attend, q[i], key[i], value[i], **gqa) for i in range(turns)]
            try:
                with sdpa_kernel(backend):
                    times[f"{name} {form}"] = run.timer.milliseconds(calls)
            except RuntimeError as error:
                print(f"{name} {form}: {str(error).splitlines()[0]}", file=sys.stderr)
    if not times:
        raise SystemExit("no attention of torch runs here; nothing to compare with")
    best = min(times, key=lambda name: times[name])
    return best, times[best]


def write_op(
    run: Run,
    floors: Floors,
    name: str,
    by: str,
    calls: list[Callable[[], object]],
    hbm: float = 0.0,
    pcie: float = 0.0,
    **where: Any,
) -> None:
    """Time one op; `hbm` and `pcie` are the bytes that it must move."""
    ms = run.timer.milliseconds(calls)
    limit = floors.milliseconds(hbm, pcie)
    run.write(
        what="op",
        op=name,
        by=by,
        **where,
        ms=ms,
        limit_ms=limit,
        share=round(limit / ms, 3),
        launch_ms=run.timer.launch_milliseconds(calls[0]),
    )


def token_counts(run: Run) -> tuple[int, int]:
    """Of a decode step and of a chunk of a prompt."""
    return 8, min(2048, run.pool_blocks * BLOCK_SIZE // 4)


def measure_writes(run: Run, floors: Floors, pool: Pool) -> None:
    """`write_kv`."""
    write = find_op("write_kv", run.device)
    for tokens in token_counts(run):
        calls: list[Callable[[], object]] = []
        for _ in range(run.turns):
            key, value = torch.randn(
                2, tokens, KV_HEADS, HEAD_SIZE, device=run.device, dtype=DTYPE
            ).unbind()
            slots = torch.randperm(pool.num_blocks * BLOCK_SIZE, device=run.device)[:tokens]
            calls.append(partial(write.function, key, value, *pool.host[:2], slots))
        size = tokens * FULL_BYTES
        write_op(run, floors, "write_kv", write.name, calls, pcie=size, tokens=tokens)


def measure_groups(run: Run, floors: Floors, pool: Pool) -> None:
    """`quantize_groups`, of the groups that so many tokens complete."""
    quantize = find_op("quantize_groups", run.device)
    in_pool = pool.num_blocks * pool.layout.groups_per_block
    for tokens in token_counts(run):
        count = -(-tokens // pool.layout.group_size)
        calls: list[Callable[[], object]] = []
        for _ in range(run.turns):
            chosen = torch.randperm(in_pool, device=run.device)[:count]
            calls.append(partial(quantize.function, chosen, *pool.host[:2], pool.derived))
        # An index reads K alone.
        share = 1.0 if pool.layout.kind is DerivedKind.DENSE else 0.5
        size = count * pool.layout.group_size * FULL_BYTES * share
        name = f"quantize_groups {pool.layout.kind.value}"
        write_op(run, floors, name, quantize.name, calls, pcie=size, groups=count)


def bytes_of_codes(pool: Pool) -> float:
    """K codes (and V codes of a dense layer) of a token, all heads, with scales and zeros."""
    layout = pool.layout
    one = HEAD_SIZE * layout.bits / 8 + 4 * HEAD_SIZE / layout.group_size
    return KV_HEADS * one * (2 if layout.kind is DerivedKind.DENSE else 1)


def check_finite(requests: list[Request]) -> None:
    """Every element of every output was written."""
    if not all(request.output.isfinite().all() for request in requests):
        raise SystemExit("an output holds NaN: some of it was not written, or is wrong")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all elements together."""
    expected = expected.to(actual.device).double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def sparse_error(pool: Pool, request: Request) -> float:
    """Of the first row, against the reference over the same tokens."""
    output = torch.empty_like(request.query[:1], device="cpu")
    rest = (request.indices, request.block_table, request.seq_lens, request.tail_start)
    reference.sparse_decode_attention(
        output,
        request.query[:1].cpu(),
        *pool.host_on_cpu[:2],
        *(tensor[:1].cpu() for tensor in rest),
        SINKS,
        SCALE,
        0.0,
    )
    return relative_error(request.output[:1], output)


def dense_error(pool: Pool, request: Request) -> float:
    """Of the first row, against the reference over the same codes."""
    output = torch.empty_like(request.query[:1], device="cpu")
    storage = pool.derived[0].codes.untyped_storage()
    raw = torch.empty(0, dtype=torch.uint8, device=request.query.device).set_(storage)
    derived = derived_pages(raw.cpu().view(pool.num_blocks, -1), pool.layout, DTYPE)
    rest = (request.block_table, request.seq_lens, request.coded)
    reference.quantized_decode_attention(
        output,
        request.query[:1].cpu(),
        *pool.host_on_cpu[:2],
        derived,
        *(tensor[:1].cpu() for tensor in rest),
        SCALE,
        0.0,
    )
    return relative_error(request.output[:1], output)


def measure_sparse(
    run: Run, floors: Floors, pool: Pool, context: int, batch: int, full: tuple[str, float]
) -> None:
    """The ops of a sparse layer, then the layer."""
    kind = pool.layout.kind.value
    requests = [make_request(pool, context, batch) for _ in range(run.turns)]
    used = ("log_mass", "score_tokens", "select_topk", "rerank_topk")
    names = {op: find_op(op, run.device).name for op in used}
    attend = find_op("sparse_decode_attention", run.device).name
    tokens = batch * context
    where = {"context": context, "batch": batch}
    moved: dict[str, float] = {"hbm": tokens * (bytes_of_codes(pool) + 4 * KV_HEADS)}
    if pool.layout.kind is DerivedKind.CHANNELS:
        moved = {
            "hbm": tokens * KV_HEADS * (4 + ROW_BYTES / pool.layout.group_size),
            "pcie": tokens * KV_HEADS * CHANNELS * DTYPE.itemsize,
        }
    tail = context - 17 - int(requests[0].tail_start[0])
    calls: list[Callable[[], object]] = [partial(weigh, pool, r) for r in requests]
    size = batch * (SINKS + tail) * KV_HEADS * ROW_BYTES
    write_op(run, floors, "log_mass", names["log_mass"], calls, pcie=size, **where)
    calls = [partial(score, pool, r) for r in requests]
    write_op(run, floors, f"score_tokens {kind}", names["score_tokens"], calls, **moved, **where)
    calls = [partial(select, r) for r in requests]
    size = tokens * KV_HEADS * 4
    write_op(run, floors, "select_topk", names["select_topk"], calls, hbm=size, **where)
    calls = [partial(rerank, pool, r) for r in requests]
    size = batch * CANDIDATES * KV_HEADS * ranked_channels(pool) * DTYPE.itemsize
    write_op(run, floors, f"rerank_topk {kind}", names["rerank_topk"], calls, pcie=size, **where)
    size = batch * (SINKS + SELECTED + tail) * FULL_BYTES
    calls = [partial(attend_sparse, pool, r) for r in requests]
    write_op(run, floors, "sparse_decode_attention", attend, calls, pcie=size, **where)
    calls = [partial(run_sparse_layer, pool, r) for r in requests]
    ms = run.timer.milliseconds(calls)
    check_finite(requests)
    error = sparse_error(pool, requests[0]) if context == run.contexts[0] else None
    write_layer(run, f"sparse {kind}", pool, ms, full, error, **where)


def measure_dense(
    run: Run, floors: Floors, pool: Pool, context: int, batch: int, full: tuple[str, float]
) -> None:
    """A dense layer is one op."""
    requests = [make_request(pool, context, batch) for _ in range(run.turns)]
    bits = pool.layout.bits
    where = {"context": context, "batch": batch}
    calls: list[Callable[[], object]] = [partial(run_dense_layer, pool, r) for r in requests]
    name = find_op("quantized_decode_attention", run.device).name
    hbm = batch * context * bytes_of_codes(pool)
    pcie = batch * (RESIDUAL + pool.layout.group_size // 2) * FULL_BYTES
    label = f"quantized_decode_attention {bits} bit"
    write_op(run, floors, label, name, calls, hbm, pcie, **where)
    check_finite(requests)
    error = dense_error(pool, requests[0]) if context == run.contexts[0] else None
    write_layer(run, f"dense {bits} bit", pool, run.records[-1]["ms"], full, error, **where)


def write_layer(
    run: Run,
    name: str,
    pool: Pool,
    ms: float,
    full: tuple[str, float],
    error: float | None,
    **where: Any,
) -> None:
    """One layer beside full attention."""
    run.write(
        what="layer",
        layer=name,
        **where,
        ms=ms,
        full_ms=full[1],
        full_by=full[0],
        speedup=round(full[1] / ms, 2),
        device_share=round(pool.layout.derived_bytes_per_token / FULL_BYTES, 4),
        error=error,
    )


def measure_staging(run: Run, floors: Floors, pool: Pool, context: int) -> None:
    """`stage_rows`, of the context before a chunk of a prompt."""
    stage = find_op("stage_rows", run.device)
    calls: list[Callable[[], object]] = []
    for _ in range(run.turns):
        request = make_request(pool, context, 1)
        count = int(request.seq_lens[0])
        rows = torch.empty(2, count, KV_HEADS, HEAD_SIZE, device=run.device, dtype=DTYPE)
        bounds = torch.tensor([0, count], dtype=torch.int32, device=run.device)
        contexts = (request.block_table, bounds, 0, count)
        calls.append(partial(stage.function, *rows, *pool.host[:2], *contexts))
    size = context * FULL_BYTES
    write_op(run, floors, "stage_rows", stage.name, calls, hbm=size, pcie=size, context=context)


def measure_preference(run: Run) -> None:
    """Once a model, so its time alone is given; it asks for values, so no graph holds it."""
    length = 8192 * run.turns if run.device.type == "cuda" else 40
    num_queries = 8 * run.turns
    query = torch.randn(num_queries, HEADS, HEAD_SIZE, device=run.device, dtype=DTYPE)
    key = torch.randn(length, KV_HEADS, HEAD_SIZE, device=run.device, dtype=DTYPE)
    op = find_op("dense_preference", run.device)
    times = []
    for _ in range(run.turns):
        start = time.perf_counter()
        op.function(query, key, 0.05, SCALE, 0.0).sum().item()
        times.append(time.perf_counter() - start)
    run.write(what="op", op="dense_preference", by=op.name, context=length, ms=1e3 * min(times))


def print_table(records: list[dict[str, Any]]) -> None:
    """The same figures for people."""
    print(
        f"\n{'op':38} {'by':9} {'context':>8} {'batch':>5} {'ms':>9} {'limit ms':>9} {'share':>6}"
    )
    for r in records:
        if r["what"] == "op":
            size = r.get("context", r.get("tokens", r.get("groups")))
            limit = f"{r['limit_ms']:9.4f} {r['share']:6.0%}" if "limit_ms" in r else ""
            print(
                f"{r['op']:38} {r['by']:9} {size:8} {r.get('batch', ''):>5} {r['ms']:9.4f} {limit}"
            )
    print(f"\n{'layer':18} {'context':>8} {'batch':>5} {'ms':>9} {'full ms':>9} {'speedup':>7}  by")
    for r in records:
        if r["what"] == "layer":
            print(
                f"{r['layer']:18} {r['context']:8} {r['batch']:5} {r['ms']:9.4f} "
                f"{r['full_ms']:9.4f} {r['speedup']:6.2f}x  {r['full_by']}"
            )


def measure(run: Run, floor_bytes: int) -> None:
    """Everything, in the order of its worth."""
    floors = measure_floors(run.timer, floor_bytes)
    run.write(what="machine", **machine(run, floors))
    host = make_host_bytes(run.pool_blocks, run.device)
    onebit = make_pool(host, DerivedKind.ONEBIT)
    dense = [make_pool(host, DerivedKind.DENSE, bits) for bits in (1, 2)]
    for context, batch in run.cases():
        full = full_attention(run, context, batch)
        measure_sparse(run, floors, onebit, context, batch, full)
        for pool in dense:
            measure_dense(run, floors, pool, context, batch, full)
    if time.monotonic() > run.deadline:
        run.write(what="left out", cases="writes, preference, staging, channels")
        return
    measure_writes(run, floors, onebit)
    measure_groups(run, floors, onebit)
    measure_groups(run, floors, dense[0])
    measure_preference(run)
    measure_staging(run, floors, onebit, run.contexts[-1])
    # Bytes have no order: the same ones serve as channel-major pages.
    channels = make_pool(host, DerivedKind.CHANNELS, key_layout=KeyLayout.CHANNEL_MAJOR)
    context = run.contexts[min(2, len(run.contexts) - 1)]
    full = full_attention(run, context, 1)
    measure_sparse(run, floors, channels, context, 1, full)


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a rehearsal")
    parser.add_argument("--json", type=Path, help="append the records to this file")
    parser.add_argument("--seconds", type=float, default=240, help="start no case after these")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; rehearse with --device cpu --tiny")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is for rehearsals: add --tiny")
    torch.manual_seed(0)
    sizes = [8192, 32768, 131072, 524288]
    run = Run(
        timer=Timer(torch.device(options.device)),
        contexts=[320] if options.tiny else sizes,
        batches=[1] if options.tiny else [1, 8],
        pool_blocks=4 if options.tiny else 8192,
        turns=1 if options.tiny else 4,
        deadline=time.monotonic() + options.seconds,
        path=options.json,
    )
    try:
        measure(run, floor_bytes=1 << 20 if options.tiny else 1 << 30)
    except TailorKVError as error:
        print(error, file=sys.stderr)
        return 1
    print_table(run.records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
