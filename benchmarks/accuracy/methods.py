"""What is compared, by name: options of tailorkv, and whose policy selects the tokens.

A method is written `NAME` or `NAME:option=value,option=value`; the options are tailorkv's, and
`budget=N` is short for the `topk_tokens` that make N tokens in all.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accuracy.engine import Engine
from accuracy.policies import POLICIES
from accuracy.previous_query import previous_query_selectors
from vllm_tailorkv.attention.selection import Selector
from vllm_tailorkv.config import TailorKVConfig, load_config
from vllm_tailorkv.errors import TailorKVError

FULL = "full"
_PREVIOUS_QUERY = "previous_query"
_ALL_LAYERS = "all"

# Options that shape pages, or what is in them, or the plan of layers: methods that agree in these
# share an engine.
_PAGE_OPTIONS = ("profile", "bits", "group_size", "fit_codes", "index", "placement", "key_rows")

# Name: options beside those given.
_OURS: dict[str, dict[str, Any]] = {
    "tailorkv": {},
    "paper": {"preset": "paper"},
    "all_sparse": {"profile": {"dense_layers": []}},
    "all_quantized": {"profile": {"dense_layers": _ALL_LAYERS}, "fit_codes": False},
    "no_sinks": {"sink_tokens": 0},
    "no_recent": {"recent_tokens": 1},
}
METHODS = (FULL, *_OURS, *POLICIES, _PREVIOUS_QUERY)
"""Names that a method may have."""


@dataclass(frozen=True)
class Method:
    """`options` None is vLLM's own backend; `policy` None is tailorkv's own selection."""

    name: str
    options: dict[str, Any] | None
    policy: str | None = None

    @property
    def config(self) -> TailorKVConfig | None:
        """The options, completed and checked."""
        return None if self.options is None else load_config(self.options)

    @property
    def engine_options(self) -> dict[str, Any] | None:
        """What the engine must be started with; methods with the same can share one."""
        if self.config is None:
            return None
        return self.config.model_dump(mode="json", include=set(_PAGE_OPTIONS))


def parse_method(text: str, num_layers: int) -> Method:
    """A method from how it is written.

    Raises:
        ValueError: an unknown name or option, or a bad value.
    """
    name, _, rest = text.partition(":")
    if name == FULL:
        return Method(text, None)
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    options = dict(_OURS.get(name, {}))
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"method {text!r}: {item!r} is not option=value")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    if options.get("profile") == {"dense_layers": _ALL_LAYERS}:
        options["profile"] = {"dense_layers": list(range(num_layers))}
    budget = options.pop("budget", None)
    try:
        if budget is not None:
            fixed = load_config({**options, "topk_tokens": 1}).budget_tokens - 1
            options["topk_tokens"] = budget - fixed
        load_config(options)
    except TailorKVError as error:
        raise ValueError(f"method {text!r}: {error}") from None
    return Method(text, options, None if name in _OURS else name)


def selectors_of(method: Method, engine: Engine) -> Sequence[Selector] | None:
    """The policy for each sparse layer; None is tailorkv's own."""
    if method.policy is None:
        return None
    if method.policy == _PREVIOUS_QUERY:
        return previous_query_selectors(engine)
    return [POLICIES[method.policy]() for _ in engine.sparse_impls]
