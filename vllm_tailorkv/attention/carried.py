"""The plan inside vLLM's configuration: put there by the first process, read by the others."""

import os
from difflib import get_close_matches
from typing import Any

from vllm.config import VllmConfig

from vllm_tailorkv.attention.memory import available_memory, local_workers
from vllm_tailorkv.attention.name import NAME
from vllm_tailorkv.config import TailorKVConfig
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.plan import Plan, make_plan
from vllm_tailorkv.profile import ModelShape

SECTION = "tailorkv"
"""The key of our options in `--additional-config`."""

FULL_ATTENTION = "full_attention"
"""vLLM's name for the layers that we serve, in `backend_per_kind`."""

DRAFTER = "vllm_tailorkv.drafter.Drafter"
"""What `--speculative-config` names as its model."""

_CARRIED = "tailorkv_plan"
_OF = "tailorkv_plan_of"
"""The options that the plan was made of: where they differ, it is another engine's."""

_UNREAD = "VLLM_ATTENTION_BACKEND"
_EXAMPLE = """--additional-config '{"tailorkv": {"topk_tokens": 256}}'"""


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether our backend was asked for, for all layers or for some kind of them."""
    attention = vllm_config.attention_config
    return any(map(_is_ours, [attention.backend, *attention.backend_per_kind.values()]))


def has_full_attention(vllm_config: VllmConfig) -> bool:
    """Whether our backend was asked for where it can serve: in layers with full attention."""
    attention = vllm_config.attention_config
    return _is_ours(attention.backend_per_kind.get(FULL_ATTENTION, attention.backend))


def _is_ours(backend: Any) -> bool:
    return backend is not None and backend.name == NAME


def drafts_itself(vllm_config: VllmConfig) -> bool:
    """Whether the model's own tailored steps draft, and steps of exact attention judge."""
    speculation = vllm_config.speculative_config
    return speculation is not None and speculation.model == DRAFTER


def refuse_other_backend(vllm_config: VllmConfig) -> None:
    """Refuse to serve by another backend where ours is asked for in vain.

    Raises:
        TailorKVError: it is, by what older vLLMs selected a backend by, or by our drafter's name.
    """
    if drafts_itself(vllm_config):
        raise TailorKVError(
            f"--speculative-config names {DRAFTER}, which drafts by another attention than that "
            "of the backend that was selected; give --attention-backend tailorkv, or leave it out"
        )
    if os.environ.get(_UNREAD, "").lower() == "tailorkv":
        raise TailorKVError(
            f"{_UNREAD}=tailorkv is not read by this vLLM; give --attention-backend tailorkv (in "
            "Python: attention_backend), and unset it"
        )


def model_shape(vllm_config: VllmConfig) -> ModelShape:
    """The model's shape, before tensor and pipeline parallelism."""
    model = vllm_config.model_config
    return ModelShape(
        name=model.model,
        architecture=(model.hf_config.architectures or ["unknown"])[0],
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        num_heads=model.model_arch_config.total_num_attention_heads,
    )


def serving_device(vllm_config: VllmConfig) -> str:
    """The kind of device that the workers compute on, as `Plan.device` has it."""
    device: str = vllm_config.device_config.device_type
    return device


def options_of(vllm_config: VllmConfig) -> Any:
    """Our section of `--additional-config`, or None.

    Raises:
        TailorKVError: options of ours stand elsewhere in it, where nothing would read them.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict):
        return None
    for key, value in additional.items():
        if key in (SECTION, _CARRIED, _OF):
            continue
        if key in TailorKVConfig.model_fields:
            raise TailorKVError(
                f"--additional-config has {key!r} beside {SECTION!r}, where it is not read; put it "
                f"inside, as in {_EXAMPLE}"
            )
        letters = "".join(filter(str.isalnum, str(key).lower()))
        if letters.startswith(SECTION) or get_close_matches(letters, [SECTION], cutoff=0.8):
            raise TailorKVError(
                f"--additional-config has {key!r}={value!r}, which is not read; the key is "
                f"{SECTION!r}, as in {_EXAMPLE}"
            )
    return additional.get(SECTION)


def carry_plan(vllm_config: VllmConfig) -> Plan:
    """Make the plan and put it into the configuration; one that is there already stays.

    Raises:
        TailorKVError: naming the option at fault and the remedy.
    """
    additional, shape = vllm_config.additional_config, model_shape(vllm_config)
    given = additional if isinstance(additional, dict) else {}
    options = options_of(vllm_config)
    if _CARRIED in given and given.get(_OF) == options:
        plan = plan_of(vllm_config)
        if plan.model == shape:
            return plan
    device, host_memory = serving_device(vllm_config), None
    if device == "cuda":
        host_memory = available_memory() // local_workers(vllm_config)
    plan = make_plan(options, shape, device=device, host_memory=host_memory)
    # A new dict: the user may give the old one to another engine.
    vllm_config.additional_config = {**given, _CARRIED: plan.as_json(), _OF: options}
    return plan


def plan_of(vllm_config: VllmConfig) -> Plan:
    """The plan that the first process has made.

    Raises:
        TailorKVError: there is none.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or _CARRIED not in additional:
        raise TailorKVError(
            "--attention-backend tailorkv: vLLM's configuration was not checked before the engine "
            "started; select the backend by that option, or attention_backend in Python"
        )
    try:
        return Plan.from_json(additional[_CARRIED])
    except (KeyError, TypeError, ValueError):
        raise TailorKVError(
            f"--additional-config has {_CARRIED!r}, which is ours to write; leave it out"
        ) from None
