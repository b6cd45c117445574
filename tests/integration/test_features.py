"""Features of vLLM that reach into a model or its cache, compared with vLLM's own backend."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from engines import engine, greedy, random_prompts
from random_checkpoint import save_random_checkpoint
from tailored import BOTH_EXACT, decode_steps, own_layers, tailored_ops
from vllm.distributed.kv_events import BlockStored, KVEventBatch

PROMPTS = random_prompts([130, 257, 380], seed=21)
STEPS = 12
BLOCKS = 1 + 2 + 3
"""Those that they complete: the last with what is said."""


@pytest.fixture(scope="module")
def plain(random_llama: Path) -> list[list[int]]:
    """What vLLM's own backend says."""
    with engine(random_llama) as llm:
        return greedy(llm, PROMPTS, STEPS)


def beams(llm: Any) -> list[list[tuple[list[int], float]]]:
    """Three beams of each prompt: tokens and log-probabilities."""
    from vllm.sampling_params import BeamSearchParams

    # They come to end just beyond a block: there a step reads one token after a cached prefix.
    prompts = [{"prompt_token_ids": prompt} for prompt in random_prompts([122, 250], seed=22)]
    params = BeamSearchParams(beam_width=3, max_tokens=10, ignore_eos=True)
    outputs = llm.beam_search(prompts, params)
    return [[(list(one.tokens), one.cum_logprob) for one in out.sequences] for out in outputs]


def test_beam_search(random_llama: Path) -> None:
    """Each step is a prompt that finds its beam's blocks in the prefix cache, so it is exact."""
    with engine(random_llama) as llm:
        expected = beams(llm)
    with tailored_ops() as rows, engine(random_llama, {}) as llm:
        found = beams(llm)
    for mine, theirs in zip(found, expected, strict=True):
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in theirs]
        scores = [score for _, score in theirs]
        assert [score for _, score in mine] == pytest.approx(scores, abs=1e-3)
        assert len({tuple(tokens) for tokens, _ in theirs}) == 3
    assert rows.total == 0


def test_head_size_512(tmp_path: Path) -> None:
    """The largest head that vLLM's attention on a CPU knows."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 512}
    model = save_random_checkpoint(tmp_path / "wide", "Llama", num_hidden_layers=2, **heads)
    with engine(model) as llm:
        expected = greedy(llm, PROMPTS, STEPS)
    two = BOTH_EXACT | {"profile": {"dense_layers": [0]}}
    with tailored_ops() as rows, engine(model, two) as llm:
        assert greedy(llm, PROMPTS, STEPS) == expected
    assert rows.dense == rows.sparse == decode_steps(PROMPTS, STEPS)


def test_reloaded_weights(random_llama: Path, plain: list[list[int]], tmp_path: Path) -> None:
    """Other weights and the first ones again, in a running engine."""
    other = save_random_checkpoint(tmp_path / "other", "Llama", std={"": 0.07})
    with engine(other) as llm:
        others = greedy(llm, PROMPTS, STEPS)
    assert others != plain
    with tailored_ops() as rows, engine(random_llama, BOTH_EXACT) as llm:
        for model, expected in [(random_llama, plain), (other, others), (random_llama, plain)]:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})
            llm.reset_prefix_cache()
            assert greedy(llm, PROMPTS, STEPS) == expected
        assert rows.total == 3 * decode_steps(PROMPTS, STEPS) * own_layers(llm)


def stored(model: Path, options: dict[str, Any] | None, endpoint: str) -> list[BlockStored]:
    """What an engine tells of stored blocks."""
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    decoder = msgspec.msgpack.Decoder(KVEventBatch)
    events: list[BlockStored] = []
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.subscribe("")
        socket.connect(endpoint)
        with engine(model, options, kv_events_config=config) as llm:
            greedy(llm, PROMPTS, STEPS)
            while sum(len(event.block_hashes) for event in events) < BLOCKS:
                assert socket.poll(10_000)
                events += decoder.decode(socket.recv_multipart()[-1]).events
    return events


def test_kv_events(random_llama: Path, tmp_path: Path) -> None:
    """What is told of stored blocks, the tokens said among it, does not depend on the backend."""
    expected = stored(random_llama, None, f"ipc://{tmp_path}/theirs")
    with tailored_ops() as rows:
        found = stored(random_llama, BOTH_EXACT, f"ipc://{tmp_path}/ours")
    assert rows.total > 0
    assert found == expected
