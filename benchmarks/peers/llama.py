"""ik_llama.cpp in a process of its own: read random tokens, decode, tell how long it took.

    python -m peers.llama JOB

JOB is a JSON object: `model`, a GGUF file; `context` and `output_tokens`; `threads`; `kv`, the
encoding of K and V. The last line printed is a JSON object: `first`, seconds until the first token,
and `steps`, seconds of each decode step.
"""

import json
import random
import sys
import time
from typing import Any

import numpy as np
from ik_llama_cpp import _ctypes_api as library
from ik_llama_cpp._internals import IkModel, make_batch_range

KV_ENCODINGS = {"f16": 1, "q8_0": 8}
"""Numbers of ggml's types."""
_CHUNK = 512


class Session:
    """A model with room for one request."""

    def __init__(self, model: str, length: int, threads: int, kv: str) -> None:
        self.model = IkModel(model)
        options = library.llama_context_default_params()
        options.n_ctx = -(-length // 256) * 256
        options.n_batch = options.n_ubatch = _CHUNK
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn = True
        options.type_k = options.type_v = KV_ENCODINGS[kv]
        self._context = library.llama_init_from_model(self.model.model, options)
        if not self._context:
            raise SystemExit(f"error: ik_llama.cpp makes no context of {length} tokens")

    def feed(self, tokens: list[int], position: int) -> int:
        """Read tokens from a position on; the likeliest next one."""
        for start in range(0, len(tokens), _CHUNK):
            chunk = tokens[start : start + _CHUNK]
            is_last = start + _CHUNK >= len(tokens)
            batch = make_batch_range(chunk, pos_start=position + start, logits_last=is_last)
            status = library.llama_decode(self._context, batch)
            library.llama_batch_free(batch)
            if status:
                raise SystemExit(f"error: llama_decode gave {status}")
        logits = library.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self.model.n_vocab,)).argmax())


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Steps, timed one by one."""
    context, steps = job["context"], job["output_tokens"]
    session = Session(job["model"], context + steps + 1, job["threads"], job["kv"])
    numbers = random.Random(0)
    tokens = [numbers.randrange(3, session.model.n_vocab) for _ in range(context)]
    start = time.perf_counter()
    token = session.feed(tokens, 0)
    first, seconds = time.perf_counter() - start, []
    for i in range(steps):
        start = time.perf_counter()
        token = session.feed([token], context + i)
        seconds.append(time.perf_counter() - start)
    return {"first": first, "steps": seconds}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
