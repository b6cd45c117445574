"""Options: the defaults, what is refused and how it is put, overrides from the environment."""

import os
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_tailorkv import envs
from vllm_tailorkv.config import DensePlan, TailorKVConfig, load_config
from vllm_tailorkv.errors import TailorKVError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith(envs.PREFIX):
            monkeypatch.delenv(variable)


DEFAULTS = {
    "preset": "default",
    "rerank_factor": 2.25,
    "profile": None,
    "bits": 2,
    "group_size": 64,
    "index_group_size": 128,
    "fit_codes": True,
    "residual_tokens": 128,
    "sink_tokens": 8,
    "recent_tokens": 56,
    "topk_tokens": 448,
    "critical_channels": 8,
    "index": "onebit",
    "query_reduce": "max",
    "full_attention_below": 2048,
    "placement": "auto",
    "key_rows": True,
    "host_pool_gib": None,
    "hot_tokens": 0,
    "guard_share": 0.0,
    "guard_bound": 0.5,
}


@pytest.mark.parametrize("options", [None, {}])
def test_defaults(options: Any) -> None:
    assert load_config(options).model_dump() == DEFAULTS


def test_every_option_has_a_sentence() -> None:
    for name, field in TailorKVConfig.model_fields.items():
        assert field.description and field.description.endswith("."), name


ACCEPTED: list[dict[str, Any]] = [
    {"bits": 1},
    {"bits": 4},
    {"group_size": 32},
    {"group_size": 128},
    {"index_group_size": 64},
    {"rerank_factor": 1.5},
    {"rerank_factor": 3},
    {"residual_tokens": 0},
    {"sink_tokens": 0},
    {"recent_tokens": 1},
    {"topk_tokens": 1},
    {"index": "onebit"},
    {"index": "channels", "critical_channels": 1},
    {"query_reduce": "mean"},
    {"placement": "joint"},
    {"placement": "split"},
    {"placement": "split", "host_pool_gib": 0.5},
    {"profile": "profile.json"},
    {"guard_share": 0.01},
    {"guard_share": 1},
    {"guard_bound": 2.5},
]


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_accepted(options: dict[str, Any]) -> None:
    assert load_config(options).model_dump() == DEFAULTS | options


def test_preset_paper_is_the_published_setting() -> None:
    config = load_config({"preset": "paper"})
    assert (config.index, config.critical_channels, config.query_reduce) == ("channels", 8, "mean")
    assert (config.sink_tokens, config.recent_tokens, config.topk_tokens) == (8, 56, 128)
    assert config.rerank_factor == 1
    assert config.budget_tokens == 192


def test_what_is_given_goes_before_the_preset() -> None:
    config = load_config({"preset": "paper", "index": "onebit", "topk_tokens": 960})
    assert (config.index, config.topk_tokens, config.rerank_factor) == ("onebit", 960, 1)
    assert load_config({"preset": "paper", "critical_channels": 12}).critical_channels == 12
    with pytest.raises(TailorKVError, match="preset"):
        load_config({"preset": "best"})
    with pytest.raises(TailorKVError, match="preset"):
        load_config({"preset": ["fast"]})


@pytest.mark.parametrize(
    ("preset", "budget", "candidates"),
    [
        ("default", 512, 1008),
        ("fast", 192, 512),
        ("accurate", 1024, 2160),
        ("paper", 192, 128),
        ("paper-long", 1024, 960),
    ],
)
def test_presets(preset: str, budget: int, candidates: int) -> None:
    config = load_config({"preset": preset})
    assert config.budget_tokens == budget
    assert config.candidate_tokens == candidates
    assert config.fit_codes == (not preset.startswith("paper"))


def test_critical_channels_go_with_their_index() -> None:
    assert load_config({"preset": "paper-long"}).critical_channels == 12
    assert load_config({"preset": "paper-long", "index": "onebit"}).index == "onebit"
    with pytest.raises(TailorKVError, match="critical_channels needs"):
        load_config({"critical_channels": 12})


def test_inline_profile() -> None:
    config = load_config({"profile": {"dense_layers": [3, 0]}})
    assert config.profile == DensePlan(dense_layers=(3, 0))


# The options, and words that the message must hold: the key and what is allowed.
REFUSED: list[tuple[Any, list[str]]] = [
    ({"bitz": 2}, ["bitz", "unknown option", *DEFAULTS]),
    ({"bits": 3}, ["bits", "1, 2 or 4"]),
    ({"bits": "two"}, ["bits", "1, 2 or 4"]),
    ({"group_size": 48}, ["group_size", "32, 64 or 128"]),
    ({"index_group_size": 48}, ["index_group_size", "32, 64 or 128"]),
    ({"rerank_factor": 0.5}, ["rerank_factor", "greater than or equal to 1"]),
    ({"rerank_factor": 100}, ["rerank_factor", "less than or equal to 64"]),
    ({"index": "x"}, ["index", "'channels' or 'onebit'"]),
    ({"query_reduce": "sum"}, ["query_reduce", "'mean' or 'max'"]),
    ({"placement": "gpu"}, ["placement", "'auto', 'joint' or 'split'"]),
    ({"sink_tokens": -1}, ["sink_tokens", "-1", "greater than or equal to 0"]),
    ({"residual_tokens": -1}, ["residual_tokens", "-1", "greater than or equal to 0"]),
    ({"recent_tokens": 0}, ["recent_tokens", "greater than or equal to 1"]),
    ({"topk_tokens": 0}, ["topk_tokens", "greater than or equal to 1"]),
    ({"topk_tokens": 8.5}, ["topk_tokens", "8.5", "integer"]),
    ({"topk_tokens": None}, ["topk_tokens", "integer"]),
    ({"critical_channels": 0}, ["critical_channels", "greater than or equal to 1"]),
    ({"residual_tokens": 4294967295}, ["residual_tokens", "less than or equal to 16777216"]),
    ({"topk_tokens": 1 << 25}, ["topk_tokens", "less than or equal to"]),
    ({"sink_tokens": 1 << 62}, ["sink_tokens", "less than or equal to"]),
    ({"recent_tokens": 1 << 31}, ["recent_tokens", "less than or equal to"]),
    ({"full_attention_below": 1 << 31}, ["full_attention_below", "less than or equal to"]),
    ({"rerank_factor": 1000000}, ["rerank_factor", "less than or equal to 64"]),
    ({"index": "channels", "critical_channels": 4096}, ["critical_channels", "1024"]),
    ({"full_attention_below": -5}, ["full_attention_below", "greater than or equal to 0"]),
    (
        {"host_pool_gib": 4, "placement": "joint"},
        ["host_pool_gib", 'placement="split"', '"joint"'],
    ),
    ({"host_pool_gib": 0, "placement": "split"}, ["host_pool_gib", "greater than 0"]),
    ({"guard_share": 1.5}, ["guard_share", "less than or equal to 1"]),
    ({"guard_share": -0.1}, ["guard_share", "greater than or equal to 0"]),
    ({"guard_share": "often"}, ["guard_share", "number"]),
    ({"guard_bound": 0}, ["guard_bound", "greater than 0"]),
    ({"host_pool_gib": "big", "placement": "split"}, ["host_pool_gib", "number"]),
    (
        {"critical_channels": 8, "index": "onebit"},
        ["critical_channels", 'index="channels"', '"onebit"'],
    ),
    ([["bits", 2]], ['additional_config["tailorkv"]', "JSON object"]),
    ("onebit", ['additional_config["tailorkv"]', "JSON object", "onebit"]),
    (2, ['additional_config["tailorkv"]', "JSON object"]),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_refused(options: Any, words: list[str]) -> None:
    with pytest.raises(TailorKVError) as caught:
        load_config(options)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    "profile",
    [
        *("", 3, [0, 1], {"dens_layers": [0]}, {"dense_layers": "ab"}),
        *({"dense_layers": [0], "layers": 2}, {"dense_layers": [True]}, {"dense_layers": ["1"]}),
    ],
    ids=str,
)
def test_profile_of_a_wrong_type_names_both_forms(profile: Any) -> None:
    with pytest.raises(TailorKVError) as caught:
        load_config({"profile": profile})
    message = str(caught.value)
    assert "profile" in message
    assert "path" in message
    assert "dense_layers" in message.replace(repr(profile), "")


def test_host_pool_of_infinite_size_is_refused() -> None:
    """Python's JSON knows Infinity; it can be no number of bytes."""
    with pytest.raises(TailorKVError, match="host_pool_gib"):
        load_config({"placement": "split", "host_pool_gib": float("inf")})


@pytest.mark.parametrize(
    ("variable", "text", "option", "value"),
    [
        ("VLLM_TAILORKV_BITS", "1", "bits", 1),
        ("VLLM_TAILORKV_INDEX", "onebit", "index", "onebit"),
        ("VLLM_TAILORKV_INDEX", '"onebit"', "index", "onebit"),
        ("VLLM_TAILORKV_PROFILE", "/models/a b.json", "profile", "/models/a b.json"),
        ("VLLM_TAILORKV_PROFILE", '{"dense_layers": [2]}', "profile", DensePlan(dense_layers=(2,))),
        ("VLLM_TAILORKV_HOST_POOL_GIB", "null", "host_pool_gib", None),
    ],
)
def test_environment_overrides(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, option: str, value: Any
) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(load_config(None), option) == value


def test_environment_wins_over_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TAILORKV_BITS", "4")
    options = {"bits": 1, "topk_tokens": 32}
    config = load_config(options)
    assert (config.bits, config.topk_tokens) == (4, 32)
    assert options == {"bits": 1, "topk_tokens": 32}


@pytest.mark.parametrize("text", ["3", "", "two", "[2]"])
def test_environment_is_validated_too(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("VLLM_TAILORKV_BITS", text)
    with pytest.raises(TailorKVError, match=r"bits.*1, 2 or 4"):
        load_config(None)


def test_environment_typing_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TAILORKV_BIT", "1")
    with pytest.raises(TailorKVError, match=r"unknown .*VLLM_TAILORKV_BIT; .*VLLM_TAILORKV_BITS"):
        load_config(None)


@pytest.mark.parametrize(
    "name",
    [
        *("PORT", "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_8000_TCP"),
        *("PORT_8000_TCP_ADDR", "PORT_8000_TCP_PORT", "PORT_8000_TCP_PROTO", "PORT_53_UDP"),
        *("ROUTER_PORT", "ROUTER_SERVICE_HOST", "ROUTER_PORT_80_TCP_ADDR"),
    ],
)
def test_variables_of_kubernetes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It sets them in every pod beside a service called vllm-tailorkv, or vllm-tailorkv-router."""
    monkeypatch.setenv(f"VLLM_TAILORKV_{name}", "tcp://10.0.0.1:8000")
    assert load_config(None).model_dump() == DEFAULTS
    # vLLM, which warns of unknown variables, is told of them as well.
    assert envs.values(["bits"])[f"VLLM_TAILORKV_{name}"] is None


@pytest.mark.parametrize("name", ["PORTS", "SERVICE", "SERVICE_HOSTS", "PORT_8000", "BITS_PORTAL"])
def test_what_only_looks_like_kubernetes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"VLLM_TAILORKV_{name}", "x")
    with pytest.raises(TailorKVError, match=f"unknown environment variable VLLM_TAILORKV_{name}"):
        load_config(None)


@pytest.mark.parametrize("variable", sorted(envs.VARIABLES))
def test_other_variables_are_no_options(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "anything")
    assert load_config(None).model_dump() == DEFAULTS
    assert envs.VARIABLES[variable].endswith(".")


def test_kernels_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert envs.kernels() is None
    monkeypatch.setenv("VLLM_TAILORKV_KERNELS", "")
    assert envs.kernels() is None
    monkeypatch.setenv("VLLM_TAILORKV_KERNELS", "reference")
    assert envs.kernels() == "reference"


def test_frozen() -> None:
    config = load_config({"profile": {"dense_layers": [0]}})
    with pytest.raises(ValidationError, match="frozen"):
        config.bits = 1
    assert isinstance(config.profile, DensePlan)
    with pytest.raises(ValidationError, match="frozen"):
        config.profile.dense_layers = (1,)


@pytest.mark.parametrize(
    ("options", "budget", "exact"),
    [
        ({}, 512, 2048),
        ({"preset": "paper"}, 192, 192),
        ({"full_attention_below": 511}, 512, 512),
        ({"full_attention_below": 4096}, 512, 4096),
        ({"topk_tokens": 4096}, 4160, 4160),
        (
            {
                "sink_tokens": 0,
                "topk_tokens": 3,
                "recent_tokens": 2,
                "full_attention_below": 0,
            },
            5,
            5,
        ),
    ],
)
def test_token_budget(options: dict[str, Any], budget: int, exact: int) -> None:
    config = load_config(options)
    assert config.budget_tokens == budget
    assert config.exact_below == exact


@pytest.mark.parametrize("option", ["bits", "topk_tokens", "host_pool_gib"])
def test_booleans_are_refused(option: str) -> None:
    with pytest.raises(TailorKVError, match=f"{option}=True: must not be a boolean"):
        load_config({option: True})


@pytest.mark.parametrize("switch", ["fit_codes", "key_rows"])
@pytest.mark.parametrize("value", [0, 1, "true", "no", None])
def test_only_booleans_for_a_switch(switch: str, value: Any) -> None:
    with pytest.raises(TailorKVError, match=rf"{switch}=.*must be true or false"):
        load_config({switch: value})


def test_switch_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TAILORKV_KEY_ROWS", "false")
    assert load_config({}).key_rows is False
