"""The retriever: a small decoder in Llama's format, in plain torch, for training and analysis."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

_NORM_EPSILON = 1e-5
_BIAS_STD = 0.3
_ALIKE = 0.6
_COPIED = 0.5
_DISTANCES, _NEARNESS, _SLOWEST = (1, 2, 1, 3), 6.0, 0.03


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder; names as in Hugging Face's `LlamaConfig`."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 384
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768

    def hf_config(self) -> dict[str, object]:
        """What belongs into the checkpoint's `config.json`."""
        return asdict(self) | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rms_norm_eps": _NORM_EPSILON,
            "attention_bias": True,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


def rotation(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin `[batch, 1, tokens, head_dim]` of `positions` `[batch, tokens]`, Llama's way."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None, :, None] / theta**exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of `x` `[batch, heads, tokens, head_dim]`."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention. Parameter names are Llama's.

    Biases let a head look at a place (the token before) whatever stands there.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        hidden, d = shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(hidden, shape.num_attention_heads * d)
        self.k_proj = nn.Linear(hidden, shape.num_key_value_heads * d)
        self.v_proj = nn.Linear(hidden, shape.num_key_value_heads * d)
        self.o_proj = nn.Linear(shape.num_attention_heads * d, hidden)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k after RoPE and v, each `[batch, its heads, tokens, head_dim]`."""
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[batch, tokens, hidden]` to the same shape."""
        q, k, v = self.qkv(x, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """SwiGLU. Parameter names are Llama's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, hidden]` to the same shape."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer. Parameter names are Llama's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, _NORM_EPSILON)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, _NORM_EPSILON)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[batch, tokens, hidden]` to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Retriever(nn.Module):
    """Token ids `[batch, tokens]` to hidden states; logits are made only where asked for.

    It starts from where training would spend most of its time to get: heads of the first layer
    look a few tokens back, queries of the others look for keys like themselves and pass on what
    they see (mimetic initialisation, arXiv 2305.09828). From a random start the same model had
    learned nothing in the time in which this one repeats what it has seen. Where the heads go
    from there is left to training.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        layers = [Layer(shape) for _ in range(shape.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(shape.hidden_size, _NORM_EPSILON)
        # The residual stream starts as the embedding, and the tied logits at a scale of one.
        nn.init.normal_(self.embed_tokens.weight)
        nn.init.constant_(self.norm.weight, shape.hidden_size**-0.5)
        for name, parameter in self.layers.named_parameters():
            if name.endswith(("v_proj.bias", "o_proj.bias", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=_BIAS_STD)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        per_kv_head = shape.num_attention_heads // shape.num_key_value_heads
        with torch.no_grad():
            for depth, layer in enumerate(layers):
                query, key, value, output = (
                    projection.weight
                    for projection in (
                        layer.self_attn.q_proj,
                        layer.self_attn.k_proj,
                        layer.self_attn.v_proj,
                        layer.self_attn.o_proj,
                    )
                )
                if depth == 0:
                    _look_back(layer.self_attn, shape.rope_theta)
                else:
                    alike = _of_query_heads(key, shape.head_dim, per_kv_head)
                    query.copy_(_ALIKE * alike + (1 - _ALIKE**2) ** 0.5 * query)
                output.copy_(_COPIED * _of_query_heads(value, shape.head_dim, per_kv_head).T)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states `[batch, tokens, hidden]`.

        `ids` and their `positions` are `[batch, tokens]`.
        """
        cos, sin = rotation(positions, self.shape.head_dim, self.shape.rope_theta)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., vocab]`; the embedding is tied."""
        return functional.linear(hidden, self.embed_tokens.weight)


def _of_query_heads(weight: Tensor, head_dim: int, per_kv_head: int) -> Tensor:
    """Rows of KV heads, repeated for their query heads."""
    return weight.unflatten(0, (-1, head_dim)).repeat_interleave(per_kv_head, 0).flatten(0, 1)


def _look_back(attention: Attention, theta: float) -> None:
    """Makes each head prefer the token at one of a few distances, whatever stands there.

    The score of a token `n` back is `_NEARNESS**2 * sum over pairs of cos(f * (n - distance))`.
    """
    half = attention.head_dim // 2
    frequencies = theta ** (-torch.arange(half) / half)
    strength = _NEARNESS * (frequencies > _SLOWEST)
    attention.q_proj.weight.mul_(0.1)
    attention.k_proj.weight.mul_(0.1)
    keys = attention.k_proj.bias.unflatten(0, (-1, 2, half))
    keys.zero_()
    keys[:, 0] = strength
    for i, head in enumerate(attention.q_proj.bias.unflatten(0, (-1, 2, half))):
        angles = -_DISTANCES[i % len(_DISTANCES)] * frequencies
        head[0], head[1] = strength * angles.cos(), strength * angles.sin()


def save_weights(model: Retriever, path: Path) -> None:
    """Writes the weights in bfloat16 under the names that Hugging Face's Llama has."""
    tensors = {f"model.{k}": v.detach().bfloat16().clone() for k, v in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def load_weights(model: Retriever, path: Path, flat_layers: int = 0) -> None:
    """Reads what `save_weights` wrote.

    A checkpoint of fewer layers is grown without changing what it says: its layers follow
    `flat_layers` new ones, whose queries begin at zero, so that they average over all tokens; what
    is left to fill comes last. All new layers begin by adding nothing (Net2Net, arXiv 1511.05641).

    Raises:
        ValueError: the model has too few layers.
    """
    tensors = {k.removeprefix("model."): v.float() for k, v in load_file(path).items()}
    loaded = set()
    for name in [name for name in tensors if name.startswith("layers.")]:
        _, depth, rest = name.split(".", 2)
        place = int(depth) + flat_layers
        if place >= len(model.layers):
            raise ValueError(
                f"{len(model.layers)} layers cannot hold layer {depth} of the checkpoint and "
                f"{flat_layers} before it"
            )
        loaded.add(place)
        tensors[f"grown.{place}.{rest}"] = tensors.pop(name)
    tensors = {k.replace("grown.", "layers.", 1): v for k, v in tensors.items()}
    new = [depth for depth in range(len(model.layers)) if depth not in loaded]
    for depth in new:
        attention, mlp = model.layers[depth].self_attn, model.layers[depth].mlp
        zeroed = [attention.o_proj.weight, attention.o_proj.bias, mlp.down_proj.weight]
        if depth < flat_layers:
            zeroed += [attention.q_proj.weight, attention.q_proj.bias]
        for parameter in zeroed:
            nn.init.zeros_(parameter)
    kept = {k: v for k, v in model.state_dict().items() if k.startswith(_prefixes(new))}
    model.load_state_dict(kept | tensors)


def _prefixes(depths: list[int]) -> tuple[str, ...]:
    return tuple(f"layers.{depth}." for depth in depths)
