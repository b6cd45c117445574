"""The retriever in torch: growing it changes nothing of what it says."""

from pathlib import Path

import pytest
import torch
from accuracy.retriever import Retriever, Shape, load_weights, rotation, save_weights

IDS = torch.arange(40).remainder(23)[None]
POSITIONS = torch.arange(40)[None]


def shape(num_layers: int) -> Shape:
    return Shape(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_weights(Retriever(shape(2)), path)
    return path


def loaded(checkpoint: Path, num_layers: int, flat_layers: int = 0) -> Retriever:
    model = Retriever(shape(num_layers))
    load_weights(model, checkpoint, flat_layers)
    return model


@pytest.mark.parametrize(("num_layers", "flat_layers"), [(2, 0), (3, 1), (3, 0), (5, 2)])
def test_grown_model_says_the_same(checkpoint: Path, num_layers: int, flat_layers: int) -> None:
    before = loaded(checkpoint, 2)(IDS, POSITIONS)
    after = loaded(checkpoint, num_layers, flat_layers)(IDS, POSITIONS)
    assert before.std() > 0.01
    assert torch.equal(after, before)


def test_flat_layers_begin_by_averaging(checkpoint: Path) -> None:
    model = loaded(checkpoint, 4, flat_layers=1)
    first = model.layers[0]
    x = first.input_layernorm(model.embed_tokens(IDS))
    cos, sin = rotation(POSITIONS, 64, model.shape.rope_theta)
    query, key, _ = first.self_attn.qkv(x, cos, sin)
    assert not query.any()
    assert key.any()


def test_too_few_layers(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="2 layers cannot hold layer 1"):
        loaded(checkpoint, 2, flat_layers=1)


def test_new_layers_learn(checkpoint: Path) -> None:
    """Nothing of a new layer is cut off from the loss for good."""
    model = loaded(checkpoint, 4, flat_layers=1)
    model.logits(model(IDS, POSITIONS)).logsumexp(-1).mean().backward()
    for depth in (0, 3):
        assert model.layers[depth].self_attn.o_proj.weight.grad.any()
        assert model.layers[depth].mlp.down_proj.weight.grad.any()
