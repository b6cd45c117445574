"""vLLM's Triton attention as `varlen` calls it, interpreted, beside plain torch.

A script, for a process of its own: vLLM must be told before it is imported. It prints the largest
errors, without sink logits and with them.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[2] / "benchmarks/gpu"),
]

import rehearsal  # noqa: E402

rehearsal.serve_as_on_gpu()

import torch  # noqa: E402
from plain_varlen import attended  # noqa: E402

from vllm_tailorkv.attention import varlen  # noqa: E402

SINKS = torch.tensor([2.0, -1e30, 0.0, 30.0])


def error(sinks: torch.Tensor | None) -> float:
    """The largest error of any element, of two requests, one with a prefix."""
    query, output, expected = (torch.randn(12, 4, 32) for _ in range(3))
    key, value = torch.randn(2, 75, 2, 32)
    starts, bounds = (torch.tensor(x, dtype=torch.int32) for x in ([0, 7, 12], [0, 7, 75]))
    contexts = varlen.Contexts(starts, bounds, [7, 5], [7, 68])
    call = varlen.Call(query, key, value, contexts, output, True, 0.2, 0.0, sinks)
    varlen.REGISTRY[-1].attend(call)
    log_sum = attended(call._replace(output=expected))
    if sinks is not None:
        expected *= (log_sum.T - sinks).sigmoid().unsqueeze(-1)
    return float((output - expected).abs().max())


if __name__ == "__main__":
    print(json.dumps([error(None), error(SINKS)]))
