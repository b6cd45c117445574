"""A small Llama checkpoint that retrieves from its context, its weights computed, not trained.

It continues a quotation: where the newest tokens have stood before in the context, it writes what
followed them there. With full attention it has missed no needle at any length it was tried at; so
when it misses under an approximation of attention, the approximation lost a token it needed.

The residual stream is divided into named ranges (`_Stream`). Every token has a random code of +-1,
and the layers move codes about:

    0, 1  flat    near-uniform attention; nothing the answer needs, but every token has a share
    2     shift   copies the codes of the tokens 1 to 4 back, one a head
    3     shift   copies those of layer 2 from 4 back: now 8 preceding codes are at hand
    4, 5  match   compares the newest codes with those that precede every earlier token, and
                  copies the code of the token where they agree

Attention scores are made sharp enough for float rounding not to matter (bfloat16 included).
"""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from vllm_tailorkv.demo.text import END_OF_TEXT, train_tokenizer
from vllm_tailorkv.profile import NEIGHBOUR, SCHEMA_VERSION, Profile, write_profile

RECIPE = 2
"""Raised whenever the weights or the tokenizer would come out different."""

NUM_LAYERS = 6
FLAT_LAYERS = (0, 1)
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_SIZE = 128
HIDDEN_SIZE = 768
VOCAB_SIZE = 2048
MAX_POSITIONS = 140_000
KV_BYTES_PER_TOKEN = NUM_LAYERS * NUM_KV_HEADS * 2 * HEAD_SIZE * 2
"""K and V of a token in all layers, bfloat16."""

_HALF = HEAD_SIZE // 2
_GROUP = NUM_HEADS // NUM_KV_HEADS
_INTERMEDIATE_SIZE = 128
_ROPE_THETA = 1e18
_NORM_EPS = 1e-6
_ARCHITECTURE = "LlamaForCausalLM"
_STAMP = "demo_model.json"

_CODE = 64
_OFFSETS = 8
# Codes in the stream at the input of each layer, from which the norm's divisor is known.
_CODES_AT_INPUT = (1, 1, 1, 5, 9, 10)
# The constant keeps the norm of the stream known, and gives shift layers something to hold on to.
_CONSTANT = 4.0
# Two different codes agree in at most 3/4 of their signs.
_MAX_CODE_DOT = 32

# Attention logits, after the division by sqrt(head size): their spread in a flat layer, the part of
# each rotary pair in a shift layer, and the whole of a perfect match. A shift layer's next best
# token is then about 20 behind, a match layer's at least 17 for every code that differs.
_FLAT_LOGIT_STD = 0.3
_SHIFT_PAIR_LOGIT = 30.0
_MATCH_LOGIT = 136.0
# Logit of the token that both match layers copy.
_TOKEN_LOGIT = 30.0

# Values at 1 bit are several times as large as they should be. They must not change the norm of
# the stream: with 5% less in one key, a shift layer would prefer that key's neighbour.
_JUNK_GAIN = 1 / 16

# Rotary pairs that turn fast tell neighbouring positions apart; those that turn by less than
# 0.05 over the longest context carry content to any distance.
_FAST_PAIRS = slice(0, 10)
_SLOW_PAIRS = slice(23, _HALF)


class _Stream:
    """Which range of the residual stream holds what."""

    own = slice(0, _CODE)
    output = slice(_CODE * (_OFFSETS + 1), _CODE * (_OFFSETS + 2))
    constant = output.stop
    junk = slice(constant + 1, HIDDEN_SIZE)

    @staticmethod
    def back(offset: int) -> slice:
        """Where the code of the token `offset` back is written; offset 0 is the own code."""
        return slice(_CODE * offset, _CODE * (offset + 1))


class _AttentionWeights:
    """The projections of one layer, float32, `[out, in]`, seen head by head."""

    def __init__(self) -> None:
        self.query = torch.zeros(NUM_HEADS, HEAD_SIZE, HIDDEN_SIZE)
        self.key = torch.zeros(NUM_KV_HEADS, HEAD_SIZE, HIDDEN_SIZE)
        self.value = torch.zeros(NUM_KV_HEADS, HEAD_SIZE, HIDDEN_SIZE)
        self.output = torch.zeros(HIDDEN_SIZE, NUM_HEADS, HEAD_SIZE)

    def tensors(self, input_rms: float) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors, undoing the division by `input_rms` of the layer's norm."""
        return {
            "q_proj": self.query.flatten(0, 1) * input_rms,
            "k_proj": self.key.flatten(0, 1) * input_rms,
            "v_proj": self.value.flatten(0, 1) * input_rms,
            "o_proj": self.output.flatten(1, 2),
        }


def build_demo_model(directory: Path, seed: int = 0) -> None:
    """Write a checkpoint in Hugging Face's Llama format, bfloat16, into `directory`.

    The directory is made if need be; files of the same names are overwritten. The same `seed`, on
    a machine with the same text files (see `text`), gives the same bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(VOCAB_SIZE)
    tokenizer.save(str(directory / "tokenizer.json"))
    end_id = tokenizer.get_vocab()[END_OF_TEXT]
    _write_json(directory / "config.json", _config(end_id))
    _write_json(directory / "generation_config.json", {"eos_token_id": end_id, "do_sample": False})
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())
    save_file(_weights(seed), directory / "model.safetensors", metadata={"format": "pt"})
    profile = Profile(
        schema_version=SCHEMA_VERSION,
        architecture=_ARCHITECTURE,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        dense_layers=FLAT_LAYERS,
    )
    write_profile(directory / NEIGHBOUR, profile)


def load_or_build_demo_model(cache_dir: Path, seed: int = 0) -> Path:
    """The directory of the checkpoint below `cache_dir`, built there unless it is complete."""
    directory = cache_dir / f"demo-model-{seed}"
    stamp = directory / _STAMP
    wanted = {"recipe": RECIPE, "seed": seed}
    try:
        found = json.loads(stamp.read_text())
    except (OSError, json.JSONDecodeError):
        found = None
    if found != wanted:
        shutil.rmtree(directory, ignore_errors=True)
        build_demo_model(directory, seed)
        _write_json(stamp, wanted)
    return directory


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint that `build_demo_model` wrote."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def _config(end_id: int) -> dict[str, object]:
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": _INTERMEDIATE_SIZE,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_THETA},
        "rms_norm_eps": _NORM_EPS,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": end_id,
    }


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    }


def _weights(seed: int) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, by its name in Hugging Face's Llama."""
    rng = torch.Generator().manual_seed(seed)
    codes = _token_codes(rng)
    embedding = torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)
    embedding[:, _Stream.own] = codes
    embedding[:, _Stream.constant] = _CONSTANT
    tensors = {"model.embed_tokens.weight": embedding}

    layers = (
        _flat_layer(rng),
        _flat_layer(rng),
        _first_shift_layer(),
        _second_shift_layer(),
        _match_layer(rng, 5),
        _match_layer(rng, _OFFSETS),
    )
    for index, (attention, num_codes) in enumerate(zip(layers, _CODES_AT_INPUT, strict=True)):
        input_rms = math.sqrt((num_codes * _CODE + _CONSTANT**2) / HIDDEN_SIZE)
        prefix = f"model.layers.{index}"
        for name, tensor in attention.tensors(input_rms).items():
            tensors[f"{prefix}.self_attn.{name}.weight"] = tensor
        for name in ("gate_proj", "up_proj"):
            tensors[f"{prefix}.mlp.{name}.weight"] = torch.zeros(_INTERMEDIATE_SIZE, HIDDEN_SIZE)
        tensors[f"{prefix}.mlp.down_proj.weight"] = torch.zeros(HIDDEN_SIZE, _INTERMEDIATE_SIZE)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = torch.ones(HIDDEN_SIZE)

    head = torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)
    head[:, _Stream.output] = codes * (_TOKEN_LOGIT / (2 * _CODE))
    tensors["lm_head.weight"] = head
    tensors["model.norm.weight"] = torch.ones(HIDDEN_SIZE)
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def _token_codes(rng: torch.Generator) -> torch.Tensor:
    """[VOCAB_SIZE, _CODE] of +-1, no two rows alike."""
    codes = torch.empty(VOCAB_SIZE, _CODE)
    for token in range(VOCAB_SIZE):
        while True:
            codes[token] = torch.randint(0, 2, (_CODE,), generator=rng) * 2.0 - 1.0
            if token == 0 or (codes[:token] @ codes[token]).abs().max() <= _MAX_CODE_DOT:
                break
    return codes


def _flat_layer(rng: torch.Generator) -> _AttentionWeights:
    """Weak attention from anything to anything; its values go, faintly, to the junk range."""
    layer = _AttentionWeights()
    # Entries of q and k have this variance, so that q.k / sqrt(head size) has the wanted one.
    std = math.sqrt(_FLAT_LOGIT_STD / _CODE)
    junk_size = HIDDEN_SIZE - _Stream.junk.start
    for weight in (layer.query, layer.key):
        weight[:, :, _Stream.own] = torch.randn(*weight.shape[:2], _CODE, generator=rng) * std
    layer.value[:, :, _Stream.own] = torch.randn(
        NUM_KV_HEADS, HEAD_SIZE, _CODE, generator=rng
    ) / math.sqrt(_CODE)
    mixed = torch.randn(junk_size, NUM_HEADS, HEAD_SIZE, generator=rng)
    layer.output[_Stream.junk] = mixed * (_JUNK_GAIN / math.sqrt(NUM_HEADS * HEAD_SIZE))
    return layer


def _point_back(layer: _AttentionWeights, offsets: tuple[int, ...]) -> None:
    """Make head `h` attend to the token `offsets[h]` back, from any position.

    All keys are alike but for their rotation; a query is a key turned back by its offset.
    """
    frequencies = _ROPE_THETA ** (-torch.arange(_HALF, dtype=torch.float64) / _HALF)[_FAST_PAIRS]
    cosines, sines = _FAST_PAIRS, slice(_FAST_PAIRS.start + _HALF, _FAST_PAIRS.stop + _HALF)
    amplitude = math.sqrt(_SHIFT_PAIR_LOGIT * math.sqrt(HEAD_SIZE)) / _CONSTANT
    layer.key[:, cosines, _Stream.constant] = amplitude
    for head, offset in enumerate(offsets):
        angle = -offset * frequencies
        layer.query[head, cosines, _Stream.constant] = (amplitude * angle.cos()).float()
        layer.query[head, sines, _Stream.constant] = (amplitude * angle.sin()).float()


def _first_shift_layer() -> _AttentionWeights:
    """Head `h` writes the code of the token `h + 1` back."""
    layer = _AttentionWeights()
    offsets = tuple(range(1, NUM_HEADS + 1))
    _point_back(layer, offsets)
    identity = torch.eye(_CODE)
    layer.value[:, :_CODE, _Stream.own] = identity
    for head, offset in enumerate(offsets):
        layer.output[_Stream.back(offset), head, :_CODE] = identity
    return layer


def _second_shift_layer() -> _AttentionWeights:
    """All heads look 4 back, where the codes of 1 to 4 back are; each KV head brings two.

    Query heads of a KV head do the same and share the work.
    """
    layer = _AttentionWeights()
    _point_back(layer, (4,) * NUM_HEADS)
    identity = torch.eye(_CODE)
    for head in range(NUM_HEADS):
        kv_head = head // _GROUP
        for part in range(2):
            offset, channels = 2 * kv_head + part + 1, slice(part * _CODE, (part + 1) * _CODE)
            layer.value[kv_head, channels, _Stream.back(offset)] = identity
            layer.output[_Stream.back(offset + 4), head, channels] = identity / _GROUP
    return layer


def _match_layer(rng: torch.Generator, num_offsets: int) -> _AttentionWeights:
    """Attend to the token whose preceding codes are this token's newest codes; copy its code.

    The `num_offsets` newest codes are compared: 5 of them are in the stream one layer before the
    first match layer, so that its query can be predicted there; 8 tell more tokens apart.

    Each offset has a random projection of its own, the same for queries and keys, so that codes
    agree only with the same code at the same offset. KV heads differ in their projections; query
    heads of a KV head do not.
    """
    layer = _AttentionWeights()
    # The product of query and key is _CODE for every offset that agrees.
    scale = math.sqrt(_MATCH_LOGIT * math.sqrt(HEAD_SIZE) / (num_offsets * _CODE))
    for kv_head in range(NUM_KV_HEADS):
        heads = slice(kv_head * _GROUP, (kv_head + 1) * _GROUP)
        for offset in range(num_offsets):
            projection = _content_projection(rng) * scale
            layer.query[heads, :, _Stream.back(offset)] = projection
            layer.key[kv_head, :, _Stream.back(offset + 1)] = projection
    identity = torch.eye(_CODE)
    layer.value[:, :_CODE, _Stream.own] = identity
    layer.output[_Stream.output, :, :_CODE] = identity.unsqueeze(1) / NUM_HEADS
    return layer


def _content_projection(rng: torch.Generator) -> torch.Tensor:
    """[HEAD_SIZE, _CODE] with orthonormal columns, on the channels that rotation leaves alone."""
    channels = torch.arange(HEAD_SIZE).reshape(2, _HALF)[:, _SLOW_PAIRS].flatten()
    random = torch.randn(len(channels), _CODE, generator=rng)
    projection = torch.zeros(HEAD_SIZE, _CODE)
    projection[channels] = torch.linalg.qr(random).Q
    return projection


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
