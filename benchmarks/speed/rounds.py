"""Rounds in which ours and vLLM's take turns, and what they say about a case."""

import math
import statistics
import time
from itertools import pairwise
from typing import Any

import torch

from speed.exact import exact_row, planted_weight, relative_error
from speed.inputs import Inputs
from speed.machine import implementation
from speed.shapes import Case
from speed.step import Step
from speed.vllm_attention import VllmStep

MIN_ROUNDS = 5
CHECKED_ROWS = 4


def measure(inputs: Inputs, case: Case, seconds: float, bandwidth: float) -> dict[str, Any]:
    """One line of results: rounds for about `seconds`, after one to warm up.

    Args:
        bandwidth: the machine's, bytes a second.
    """
    step = Step(inputs, case)
    theirs = {"baseline": VllmStep(inputs, step.sets, "auto")}
    missing = None
    try:
        theirs["fp8_baseline"] = VllmStep(inputs, step.sets, "fp8")
    except NotImplementedError as error:
        missing = str(error)
    parts, times = _rounds(step, theirs, seconds)
    ms = statistics.median(times["ours"])
    median = {name: statistics.median(values) for name, values in times.items()}
    fp8 = median.get("fp8_baseline")
    return {
        "layer": case.layer,
        "index": case.index,
        "bits": case.bits,
        "selected": case.selected if case.layer == "sparse" else None,
        "rerank": case.rerank if case.layer == "sparse" else None,
        "query_reduce": case.query_reduce if case.layer == "sparse" else None,
        "context": inputs.context,
        "batch": inputs.batch,
        "threads": torch.get_num_threads(),
        **implementation(list(step.ops())),
        "ms": round(ms, 4),
        "min_ms": round(min(times["ours"]), 4),
        "baseline_isa": theirs["baseline"].isa,
        "baseline_ms": round(median["baseline"], 4),
        "baseline_min_ms": round(min(times["baseline"]), 4),
        "ratio": round(median["baseline"] / ms, 2),
        "fp8_baseline_ms": None if fp8 is None else round(fp8, 4),
        "fp8_baseline_min_ms": None if fp8 is None else round(min(times["fp8_baseline"]), 4),
        "fp8_ratio": None if fp8 is None else round(fp8 / ms, 2),
        **({} if missing is None else {"fp8_missing": missing}),
        "parts": {name: round(statistics.median(part), 4) for name, part in parts.items()},
        "page_sets": len(step.sets),
        "bytes_read": step.bytes_read,
        "bandwidth_share": round(step.bytes_read / (ms / 1e3) / bandwidth, 3),
        **_checks(step, theirs),
        "rounds": len(times["ours"]),
    }


def _rounds(
    step: Step, theirs: dict[str, VllmStep], seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of our single ops, and of whole steps: `ours` and each of `theirs`."""
    ops = step.ops()
    parts: dict[str, list[float]] = {name: [] for name in ops}
    times: dict[str, list[float]] = {name: [] for name in ("ours", *theirs)}
    deadline, number = math.inf, 0
    while time.perf_counter() < deadline or number <= MIN_ROUNDS:
        pages = step.sets[number % len(step.sets)]
        clock = [time.perf_counter()]
        for op in ops.values():
            op(pages)
            clock.append(time.perf_counter())
        for baseline in theirs.values():
            baseline.run(number)
            clock.append(time.perf_counter())
        if number == 0:
            deadline = clock[-1] + seconds
        else:
            spans = [1e3 * (end - start) for start, end in pairwise(clock)]
            for part, span in zip(parts.values(), spans, strict=False):
                part.append(span)
            times["ours"].append(sum(spans[: len(ops)]))
            for name, span in zip(theirs, spans[len(ops) :], strict=True):
                times[name].append(span)
        number += 1
    return parts, times


def _checks(step: Step, theirs: dict[str, VllmStep]) -> dict[str, Any]:
    """Errors against float64, the largest of some rows, and what became of planted tokens."""
    pages = step.sets[0]
    for op in step.ops().values():
        op(pages)
    if step.case.layer == "sparse":
        step.retrieve(pages)
    for baseline in theirs.values():
        baseline.run(0)
    batch = step.inputs.batch
    rows = sorted({round(i) for i in torch.linspace(0, batch - 1, CHECKED_ROWS).tolist()})
    ours, weights = [], []
    errors: dict[str, list[float]] = {name: [] for name in theirs}
    for row in rows:
        ours.append(relative_error(step.output[row], exact_row(step, pages, row, as_ours=True)))
        full = exact_row(step, pages, row, as_ours=False)
        for name, baseline in theirs.items():
            errors[name].append(relative_error(baseline.output[row], full))
        weights.append(planted_weight(step, pages, row))
    return {
        "relative_error": max(ours),
        "baseline_error": max(errors["baseline"]),
        "fp8_baseline_error": max(errors["fp8_baseline"]) if "fp8_baseline" in errors else None,
        "rows_checked": len(rows),
        "planted_weight": round(statistics.mean(weights), 4),
        "planted_kept": step.planted_kept(),
    }
