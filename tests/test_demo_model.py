"""The demo's model answers from anywhere in its context, and its layers are what they claim."""

import copy
import filecmp
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from vllm_tailorkv.demo import model as demo_model
from vllm_tailorkv.demo.text import Haystack, build_haystack, make_needles
from vllm_tailorkv.errors import TailorKVError

NUM_TOKENS = 2048
NEEDLES = 8
# "Ġ", six digits and a full stop.
ANSWER_TOKENS = 8
Attentions = tuple[torch.Tensor, ...]
SHIFT_LAYERS, MATCH_LAYERS = (2, 3), (4, 5)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make single-token steps slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    demo_model.build_demo_model(path)
    return path


@pytest.fixture(scope="module")
def haystack(directory: Path) -> Haystack:
    tokenizer = demo_model.load_tokenizer(directory)
    return build_haystack(tokenizer, NUM_TOKENS, make_needles(NEEDLES, seed=3), seed=3)


@pytest.fixture(scope="module")
def llama(directory: Path) -> Iterator[PreTrainedModel]:
    with torch.inference_mode():
        yield AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa"
        )


@pytest.fixture(scope="module")
def attentions(directory: Path, haystack: Haystack) -> Attentions:
    """Each layer's weights [1, heads, tokens, tokens] over the haystack."""
    tokenizer = demo_model.load_tokenizer(directory)
    llama = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation="eager"
    )
    with torch.inference_mode():
        tokens = torch.tensor([tokenizer.encode(haystack.text).ids])
        return llama(tokens, output_attentions=True).attentions


def test_it_answers_every_needle(
    llama: PreTrainedModel, directory: Path, haystack: Haystack
) -> None:
    tokenizer = demo_model.load_tokenizer(directory)
    prefix = DynamicCache()
    llama(torch.tensor([tokenizer.encode(haystack.text).ids]), past_key_values=prefix)
    for placed in haystack.needles:
        cache = copy.deepcopy(prefix)
        tokens = torch.tensor([tokenizer.encode(placed.needle.question).ids])
        answer: list[int] = []
        for _ in range(ANSWER_TOKENS):
            tokens = llama(tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
            answer.append(int(tokens))
        assert placed.needle.is_answered_by(tokenizer.decode(answer))


def test_flat_layers_are_dense_and_the_others_sparse(attentions: Attentions) -> None:
    num_tokens = attentions[0].shape[-1]
    newest = [layer[0, :, -32:].float() for layer in attentions]
    largest = round(0.05 * num_tokens)
    scores = [1 - float(weights.topk(largest).values.sum(-1).mean()) for weights in newest]

    assert all(scores[layer] > 0.8 for layer in demo_model.FLAT_LAYERS)
    assert all(scores[layer] < 0.01 for layer in (*SHIFT_LAYERS, *MATCH_LAYERS))
    for layer in demo_model.FLAT_LAYERS:
        # Near-uniform: no token has many times its share.
        assert newest[layer][:, -1].max() < 10 / num_tokens


def test_shift_layers_look_back_by_their_offset(attentions: Attentions) -> None:
    for layer, offsets in zip(SHIFT_LAYERS, ((1, 2, 3, 4), (4, 4, 4, 4)), strict=True):
        for head, offset in enumerate(offsets):
            weights = attentions[layer][0, head].diagonal(-offset)[16:]
            assert weights.min() > 0.99


def test_same_seed_same_bytes(directory: Path, tmp_path: Path) -> None:
    demo_model.build_demo_model(tmp_path / "again")
    demo_model.build_demo_model(tmp_path / "other", seed=1)
    names = [path.name for path in directory.iterdir()]
    assert filecmp.cmpfiles(directory, tmp_path / "again", names, shallow=False)[0] == names
    assert "model.safetensors" in filecmp.cmpfiles(directory, tmp_path / "other", names, False)[1]


def test_it_is_small(directory: Path) -> None:
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 40 * 10**6


def test_a_complete_model_is_reused_and_an_incomplete_one_is_not(tmp_path: Path) -> None:
    directory = demo_model.load_or_build_demo_model(tmp_path)
    weights = directory / "model.safetensors"
    built = weights.stat().st_mtime_ns
    assert demo_model.load_or_build_demo_model(tmp_path) == directory
    assert weights.stat().st_mtime_ns == built

    (directory / "demo_model.json").unlink()
    weights.write_bytes(b"")
    demo_model.load_or_build_demo_model(tmp_path)
    assert weights.stat().st_size > 0


@pytest.mark.parametrize("num_tokens", [1024, 16384])
@pytest.mark.parametrize("count", [1, 8])
def test_haystack_holds_every_needle_once_in_order(
    directory: Path, num_tokens: int, count: int
) -> None:
    tokenizer = demo_model.load_tokenizer(directory)
    needles = make_needles(count, seed=1)
    haystack = build_haystack(tokenizer, num_tokens, needles, seed=1)

    tokens = tokenizer.encode(haystack.text).ids
    assert len(tokens) == haystack.num_tokens
    assert num_tokens - 128 <= haystack.num_tokens <= num_tokens
    assert [placed.needle for placed in haystack.needles] == needles
    for placed in haystack.needles:
        assert haystack.text.count(placed.needle.name) == 1
        sentence = tokenizer.encode(placed.needle.sentence).ids
        assert tokens[placed.token_offset :][: len(sentence)] == sentence
    depths = [placed.token_offset / num_tokens for placed in haystack.needles]
    assert depths[0] < 0.1
    assert all(later > earlier for earlier, later in itertools.pairwise(depths))
    if count > 1:
        assert depths[-1] > 0.9


def test_haystack_is_the_same_for_the_same_seed(directory: Path) -> None:
    tokenizer = demo_model.load_tokenizer(directory)
    first, again, other = (
        build_haystack(tokenizer, 1024, make_needles(2, seed), seed).text for seed in (1, 1, 2)
    )
    assert first == again != other


def test_haystack_too_short_for_its_needles(directory: Path) -> None:
    tokenizer = demo_model.load_tokenizer(directory)
    with pytest.raises(TailorKVError, match="8 needles do not fit into 100 tokens"):
        build_haystack(tokenizer, 100, make_needles(8, seed=0), seed=0)
