"""A vLLM engine in this process, whose options and selection policy can change while it runs."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.outputs import CompletionOutput
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from accuracy.scripts import FREE, Script
from vllm_tailorkv.attention.builder import TailorKVMetadataBuilder
from vllm_tailorkv.attention.impl import TailorKVImpl
from vllm_tailorkv.attention.selection import Selector, retrieve
from vllm_tailorkv.config import load_config
from vllm_tailorkv.kernels.types import DenseCodes

Watch = Callable[[int, torch.Tensor], None]
"""Sees what the model thinks at a place of a script: the place, and float32 logits [V]."""
_watches: dict[str, Watch] = {}


class ScriptedTokens(AdapterLogitsProcessor):
    """Makes a request follow its script where the script names a token.

    So a question, or any given text, passes through the model as decode steps.
    """

    def is_argmax_invariant(self) -> bool:
        """It changes what is chosen."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """See `Engine.decode` for what `extra_args` hold."""
        extra = params.extra_args or {}
        if "script" not in extra:
            return None
        script = Script(extra["script"], frozenset(extra["ends"]))
        watch = _watches.get(extra["watch"])
        followed = 0

        def follow(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            nonlocal followed
            for token in output_ids[followed:]:
                script.advance(token)
            followed = len(output_ids)
            if watch is not None:
                watch(followed, logits)
            token = extra["stop"] if script.over else script.wanted
            if token == FREE:
                return logits
            forced = torch.full_like(logits, float("-inf"))
            forced[token] = 0.0
            return forced

        return follow


@dataclass(frozen=True)
class Decoded:
    """What a request wrote: token ids and, where asked for, what the model thought of them.

    logprobs: log-likelihood before forcing.
    likeliest: what the model would have written.
    """

    ids: list[int]
    logprobs: list[float]
    likeliest: list[int]


class Engine:
    """An `LLM` and what the harness changes in it."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        core: Any = llm.llm_engine.engine_core
        self.runner = core.engine_core.model_executor.driver_worker.worker.model_runner
        context = self.runner.vllm_config.compilation_config.static_forward_context
        layers = {name: getattr(layer, "impl", None) for name, layer in context.items()}
        self.impls: list[TailorKVImpl] = [
            impl for impl in layers.values() if isinstance(impl, TailorKVImpl)
        ]

    @property
    def sparse_impls(self) -> list[TailorKVImpl]:
        """The layers that select, in order."""
        return [
            impl
            for impl in self.impls
            if impl.pages is not None and not isinstance(impl.pages.derived, DenseCodes)
        ]

    def configure(self, options: dict[str, Any], selectors: Sequence[Selector] | None) -> None:
        """Take other options, such as change no page, and other policies, one a sparse layer."""
        config = load_config(options)
        for impl in self.impls:
            impl.config = config
        for groups in self.runner.attn_groups:
            for group in groups:
                builder = group.get_metadata_builder()
                if isinstance(builder, TailorKVMetadataBuilder):
                    builder.served.batch.config = config
        sparse = self.sparse_impls
        for impl, selector in zip(sparse, selectors or [retrieve] * len(sparse), strict=True):
            impl.selector = selector

    def decode(
        self,
        context: list[int],
        scripts: Sequence[list[int]],
        *,
        logprobs: bool = False,
        ends: frozenset[int] = frozenset(),
        watches: Sequence[Watch] = (),
    ) -> list[Decoded]:
        """Follow each of `scripts` after `context`, all in one batch.

        Args:
            ends: tokens that end a free run, see `Script`. A request stops where its script does.
            watches: one a script, or none.
        """
        vocab_size = self.runner.model_config.get_vocab_size()
        # vLLM would stop at an end that is given; so a token stops that is in no script.
        stops = [next(i for i in range(vocab_size - 1, -1, -1) if i not in s) for s in scripts]
        names = [str(place) for place, _ in enumerate(watches)] or [""] * len(scripts)
        _watches.update(zip(names, watches, strict=False))
        outputs = self.llm.generate(
            [{"prompt_token_ids": context} for _ in scripts],
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=len(script),
                    ignore_eos=True,
                    stop_token_ids=[stop] if ends else None,
                    detokenize=False,
                    logprobs=1 if logprobs else None,
                    extra_args={
                        "script": script,
                        "ends": sorted(ends),
                        "stop": stop,
                        "watch": name,
                    },
                )
                for script, stop, name in zip(scripts, stops, names, strict=True)
            ],
            use_tqdm=False,
        )
        _watches.clear()
        return [_decoded(output.outputs[0]) for output in outputs]

    @property
    def one_at_a_time(self) -> bool:
        """A policy remembers its request."""
        return any(getattr(impl.selector, "stateful", False) for impl in self.sparse_impls)

    def restart(self, question_tokens: int) -> None:
        """Tell policies that remember anything that requests begin."""
        for impl in self.sparse_impls:
            selector: Any = impl.selector
            if hasattr(selector, "restart"):
                selector.restart(question_tokens)

    def read(self, context: list[int]) -> None:
        """Fill the prefix cache, so that many requests over `context` read it once."""
        self.decode(context, [[FREE]])

    def bytes_per_token(self) -> dict[str, float]:
        """Bytes that a token of context takes in each tier, over all layers."""
        host = derived = 0.0
        for impl in self.impls:
            assert impl.spec is not None
            layout = impl.spec.layout
            host += layout.host_bytes / layout.block_size
            derived += layout.derived_bytes / layout.block_size
        return {"host": host, "derived": derived}


def _decoded(output: CompletionOutput) -> Decoded:
    ids = list(output.token_ids)
    seen = [step[token] for step, token in zip(output.logprobs or (), ids, strict=False)]
    likeliest = [
        next(token for token, x in step.items() if x.rank == 1) for step in output.logprobs or ()
    ]
    return Decoded(ids, [x.logprob for x in seen], likeliest)


@contextmanager
def start(
    model: str, max_model_len: int, kv_cache_gib: float, options: dict[str, Any] | None
) -> Iterator[Engine]:
    """An engine with tailorkv and these options, or with vLLM's own backend if they are None."""
    # Policies are set on the layers themselves, so the engine must be in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    ours: dict[str, Any] = {}
    if options is not None:
        ours = {
            "attention_backend": "tailorkv",
            "additional_config": {"tailorkv": options},
        }
    llm = LLM(
        model=model,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
        enable_prefix_caching=True,
        enforce_eager=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        logits_processors=[ScriptedTokens],
        **ours,
    )
    engine = Engine(llm)
    try:
        yield engine
    finally:
        # Now, not when the variable goes: vLLM's process groups go with it.
        llm.llm_engine.engine_core.shutdown()
        del engine, llm
        gc.collect()
