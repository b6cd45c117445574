"""The options of TailorKV: frozen, validated, each with its meaning, no torch, no vLLM.

They come from vLLM's `--additional-config '{"tailorkv": {...}}'`; an environment variable
`VLLM_TAILORKV_<OPTION>` overrides one of them.
"""

import json
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vllm_tailorkv import envs
from vllm_tailorkv.errors import TailorKVError

MOST_TOKENS = 1 << 24
"""The largest count of tokens that an option may have: more than any context, and products of it
still fit the ops' 32-bit positions."""


class DensePlan(BaseModel):
    """A layer profile given inline: the indices of the dense layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense_layers: tuple[StrictInt, ...]


PAPER: dict[str, Any] = {
    "index": "channels",
    "critical_channels": 8,
    "query_reduce": "mean",
    "rerank_factor": 1.0,
    "sink_tokens": 8,
    "recent_tokens": 56,
    "topk_tokens": 128,
    "bits": 2,
    "fit_codes": False,
    "full_attention_below": 0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"topk_tokens": 128, "rerank_factor": 4.0},
    "accurate": {"topk_tokens": 960},
    "paper": PAPER,
    "paper-long": PAPER | {"critical_channels": 12, "topk_tokens": 960},
}
"""Values of options by preset, where they are not given and not the default.

`fast` and `accurate` read fewer and more tokens than the default. `paper` is the published setting
of LongBench's experiments (TailorKV-2), `paper-long` that of RULER's.
"""


class TailorKVConfig(BaseModel):
    """Options of TailorKV; `preset` names sets of them, the published ones among them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["default", "fast", "accurate", "paper", "paper-long"] = Field(
        default="default",
        description="Values of the options that are not given: fast reads 192 tokens a step, "
        "default 512, accurate 1,024; paper and paper-long are the published settings for 192 and "
        "1,024 tokens.",
    )
    profile: str | DensePlan | None = Field(
        default=None,
        description="Which layers are dense: the path of a profile, or "
        '{"dense_layers": [0, 1]}. Default: tailorkv.json beside the model, else a profile that '
        "comes with this package, else no layer.",
    )
    bits: Literal[1, 2, 4] = Field(
        default=2, description="Bits of a code of K and V in a dense layer."
    )
    group_size: Literal[32, 64, 128] = Field(
        default=64,
        description="Tokens (K) or channels (V) of a dense layer that share a scale; divides "
        "--block-size.",
    )
    fit_codes: bool = Field(
        default=True,
        description="K's codes of 1 and 2 bits and V's of 1 bit take their scale by least squares; "
        "false: it spans a group's extremes, as published, with twice the error.",
    )
    residual_tokens: int = Field(
        default=128,
        ge=0,
        le=MOST_TOKENS,
        description="Newest tokens that a dense layer reads exactly.",
    )
    sink_tokens: int = Field(
        default=8,
        ge=0,
        le=MOST_TOKENS,
        description="First tokens that a sparse layer always reads.",
    )
    recent_tokens: int = Field(
        default=56,
        ge=1,
        le=MOST_TOKENS,
        description="Newest tokens that a sparse layer always reads.",
    )
    topk_tokens: int = Field(
        default=448,
        ge=1,
        le=MOST_TOKENS,
        description="Tokens between first and newest that a sparse layer retrieves in a step.",
    )
    critical_channels: int = Field(
        default=8, ge=1, le=1024, description='Channels of K scored, with index="channels".'
    )
    index: Literal["channels", "onebit"] = Field(
        default="onebit",
        description="How sparse layers find tokens: by K at 1 bit, or by a few channels of K.",
    )
    index_group_size: Literal[32, 64, 128] = Field(
        default=128,
        description='Tokens that share a scale, with index="onebit"; fewer where --block-size is '
        "no multiple of it.",
    )
    query_reduce: Literal["mean", "max"] = Field(
        default="max",
        description="How the query heads of a KV head agree on tokens: the largest of their "
        "scores, each measured against what the head pays to sinks and newest tokens, or their "
        "mean query, which scores once and not for every head.",
    )
    rerank_factor: float = Field(
        default=2.25,
        ge=1,
        le=64,
        description="The index proposes topk_tokens times this many candidates. The topk_tokens of "
        "them that truly weigh most are taken; 1: what the index ranks highest is taken.",
    )
    full_attention_below: int = Field(
        default=2048,
        ge=0,
        le=MOST_TOKENS,
        description="Contexts of up to this many tokens are attended in full, which costs little "
        "there. Those within the token budget (512 by default) always are. On a GPU, which reads "
        "them over the bus, the default is 0.",
    )
    placement: Literal["auto", "joint", "split"] = Field(
        default="auto",
        description="joint: both tiers in vLLM's pages (auto on CPU); split: full-precision "
        "K/V in a pool of our own, in host memory (auto on GPUs, which know no other).",
    )
    key_rows: bool = Field(
        default=True,
        description='With index="channels" on CPUs, where K lies channel by channel: keep it once '
        "more, token by token. Gathering is up to four times faster, for half as much host memory "
        "again. Otherwise it has no effect: K lies token by token, once.",
    )
    host_pool_gib: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description='GiB of each worker\'s host pool with placement="split". Default on CPU: '
        "its share of vLLM's cache memory; on GPUs: 60% of the memory available, shared by the "
        "workers of a machine.",
    )
    hot_tokens: int = Field(
        default=0,
        ge=0,
        le=MOST_TOKENS,
        description="Tokens of which each KV head of a sparse layer keeps K and V on the GPU too, "
        "the ones read last: they cost no transfer. A power of two, or the next one; 0: none. "
        "4,096 take 0.5 GiB in the shape of Llama-3.1-8B. On GPUs only; no engine has run with "
        "it on a GPU yet.",
    )
    guard_share: float = Field(
        default=0,
        ge=0,
        le=1,
        description="Share of decode steps in which each layer also attends exactly to one row, "
        "so that metrics tell what is lost; what is served stays the same. On CPUs only.",
    )
    guard_bound: float = Field(
        default=0.5,
        gt=0,
        allow_inf_nan=False,
        description="Relative error of a layer's output in a guarded row, above which the log "
        "warns, once a minute at the most.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        preset = PRESETS.get(str(values.get("preset"))) if isinstance(values, dict) else None
        if preset is None:
            return values
        filled = preset | values
        if filled.get("index") != preset.get("index") and "critical_channels" not in values:
            filled.pop("critical_channels", None)
        return filled

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_wrong_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        # Python would take booleans for 0 and 1, and pydantic words for booleans.
        assert info.field_name is not None
        wants_one = cls.model_fields[info.field_name].annotation is bool
        if isinstance(value, bool) != wants_one:
            raise ValueError("must be true or false" if wants_one else "must not be a boolean")
        return value

    @field_validator("profile")
    @classmethod
    def _refuse_an_empty_path(cls, value: str | DensePlan | None) -> str | DensePlan | None:
        if value == "":  # which would be this folder
            raise ValueError("must not be empty")
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.host_pool_gib is not None and self.placement == "joint":
            raise ValueError(
                'host_pool_gib needs placement="split", is "joint": with it '
                "vLLM's own cache memory (--kv-cache-memory-bytes) holds both tiers"
            )
        if "critical_channels" in self.model_fields_set and self.index != "channels":
            raise ValueError(
                f'critical_channels needs index="channels", is "{self.index}": drop one of them'
            )
        return self

    @property
    def budget_tokens(self) -> int:
        """Tokens that a sparse layer reads in full precision in a decode step."""
        return self.sink_tokens + self.topk_tokens + self.recent_tokens

    @property
    def candidate_tokens(self) -> int:
        """Tokens that the index proposes in a decode step."""
        return int(self.topk_tokens * self.rerank_factor)

    @property
    def exact_below(self) -> int:
        """Contexts of up to this many tokens are attended in full, in every layer."""
        return max(self.full_attention_below, self.budget_tokens)


def _explain(error: ValidationError) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors()[0]
    key = ".".join(
        str(part) for part in first["loc"] if part not in ("str", "DensePlan", "function-after")
    )
    if first["type"] == "extra_forbidden":
        return f"unknown option {key!r}; allowed are {', '.join(TailorKVConfig.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if key.partition(".")[0] == "profile":
        message = 'must be the path of a profile, or {"dense_layers": [0, 1]}'
    if not key:
        return message
    return f"{key}={first['input']!r}: {message}"


def load_config(options: Any) -> TailorKVConfig:
    """Validate options, environment overrides included.

    Args:
        options: the value of `additional_config["tailorkv"]`, a dict or None.

    Raises:
        TailorKVError: naming the key at fault and what it may be.
    """
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise TailorKVError(
            f'additional_config["tailorkv"] must be a JSON object, is {options!r}; for instance '
            """'{"tailorkv": {"bits": 4}}'"""
        )
    values = dict(options)
    for option, text in envs.option_overrides(TailorKVConfig.model_fields).items():
        try:
            values[option] = json.loads(text)
        except json.JSONDecodeError:
            values[option] = text
    try:
        return TailorKVConfig.model_validate(values)
    except ValidationError as error:
        raise TailorKVError(f"tailorkv: {_explain(error)}") from None
