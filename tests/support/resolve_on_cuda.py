"""What vLLM and we make of configurations on GPUs that are not there; run as a program.

It reads a JSON object from standard input: by name, a function of this module and its arguments,
those of `EngineArgs` unless it says otherwise. It writes what came of each, by name. Any of them
may also have `env`, variables of the environment, and `ram`, bytes of memory available.
"""

# The GPUs come first, in processes that this one starts too.
# ruff: noqa: E402
import fake_cuda

initialisations = fake_cuda.pretend(gpus=2)

import contextlib
import copy
import io
import json
import logging
import multiprocessing
import os
import sys
from typing import Any
from unittest import mock

import torch
from cache_planning import plan_caches
from prometheus_client import REGISTRY
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.utils import get_pp_indices
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import record_kv_cache_layout
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_tailorkv.attention import budget, carried, limits, support, varlen
from vllm_tailorkv.attention.builder import TailorKVMetadataBuilder
from vllm_tailorkv.attention.name import LOGGER
from vllm_tailorkv.attention.report import METRIC
from vllm_tailorkv.attention.spec import layer_spec
from vllm_tailorkv.doctor import command as doctor
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.kernels import dispatch

RAM = 400 << 30


class Collect(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def resolve(arguments: dict[str, Any]) -> Any:
    values = {"attention_backend": "TAILORKV", "skip_tokenizer_init": True, "load_format": "dummy"}
    variables, ram = arguments.pop("env", {}), arguments.pop("ram", RAM)
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(carried, "available_memory", lambda: ram),
        mock.patch.object(limits, "available_memory", lambda: ram),
    ):
        return EngineArgs(**(values | arguments)).create_engine_config()


def facts(config: Any) -> dict[str, Any]:
    """What a configuration says that is ours to see to."""
    plan = carried.plan_of(config)
    return {
        "backend": config.attention_config.backend.name,
        "block_size": config.cache_config.block_size,
        "device": plan.device,
        "host_pool": plan.host_pool,
        "full_attention_below": plan.config.full_attention_below,
    }


def engine(arguments: dict[str, Any]) -> dict[str, Any]:
    config = resolve(arguments)
    compilation = copy.deepcopy(config.compilation_config)
    mode: CUDAGraphMode = compilation.resolve_cudagraph_mode_and_sizes(
        TailorKVMetadataBuilder.get_cudagraph_support(config, None),
        "TailorKVBackend",
        config.uniform_decode_query_len,
        use_v2_model_runner=True,
    )
    labels = [
        sample.labels
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == METRIC
    ]
    return facts(config) | {
        "worker": config.parallel_config.worker_cls,
        "second_runner": config.use_v2_model_runner,
        "async": config.scheduler_config.async_scheduling,
        "graphs": mode.name,
        "local_workers": config.parallel_config.local_world_size,
        "metric": labels[0],
        "small_pages": "THP_MEM_ALLOC_ENABLE" not in os.environ,
    }


def read_back(config: Any) -> dict[str, Any]:
    """What another process finds in a configuration."""
    return facts(config)


def spawned(arguments: dict[str, Any]) -> dict[str, Any]:
    config = resolve(arguments)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return {"here": facts(config), "there": pool.apply(read_back, (config,))}


def cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """As the engine core does, given `memory`: the bytes that each worker found for its cache.

    `draft_layers`: how many layers there are beside ours, of vLLM's own backend.
    """
    from vllm.v1.engine import core

    memory, draft_layers = arguments.pop("memory"), arguments.pop("draft_layers", 0)
    config = resolve(arguments)
    model, parallel = config.model_config, config.parallel_config
    stages, ranks = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
    workers = []
    for stage in range(stages):
        first, last = get_pp_indices(model.get_total_num_hidden_layers(), stage, stages)
        names = [f"model.layers.{layer}.self_attn.attn" for layer in range(first, last)]
        spec = FullAttentionSpec(
            block_size=config.cache_config.block_size,
            num_kv_heads=model.get_num_kv_heads(parallel),
            head_size=model.get_head_size(),
            dtype=model.dtype,
        )
        ours = {name: layer_spec(spec, name, config) for name in names}
        theirs = {f"draft.layers.{layer}.self_attn.attn": spec for layer in range(draft_layers)}
        workers += [ours | theirs] * ranks
    core.register_all_kvcache_specs(config)
    record_kv_cache_layout(config.cache_config, "LBHNC")
    # vLLM takes away the handlers of its loggers' children now and then.
    collect, logger = Collect(), logging.getLogger(LOGGER)
    logger.addHandler(collect)
    configs = plan_caches(config, workers, memory)
    logger.removeHandler(collect)
    sizings = [budget.cache_sizing(worker) for worker in workers]
    return facts(config) | {
        "blocks": [one.num_blocks for one in configs],
        "host_bytes": [sizing.host_bytes for sizing in sizings],
        "device_bytes": [sizing.pool_bytes for sizing in sizings],
        "log": collect.lines,
    }


def layer(fields: dict[str, Any]) -> str:
    """The backend of a layer, given what sets vLLM's question for it apart from the usual one."""
    usual = {"head_size": 128, "dtype": "bfloat16", "kv_cache_dtype": "auto", "block_size": 128}
    values = usual | fields
    values["dtype"] = getattr(torch, values["dtype"])
    return type(current_platform).get_attn_backend_cls(
        AttentionBackendEnum["TAILORKV"], AttentionSelectorConfig(**values)
    )


def on_another_platform(arguments: dict[str, Any]) -> dict[str, Any]:
    """Given `platform`, a name; its devices may be called cuda all the same."""
    name = arguments.pop("platform")
    config = resolve(arguments)
    kind = type(current_platform)
    with (
        mock.patch.object(kind, "_enum", PlatformEnum[name.upper()]),
        mock.patch.object(kind, "device_name", name),
    ):
        support.check_engine(config)
    return facts(config)


def on_an_older_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    older = classmethod(lambda cls, device_id=0: DeviceCapability(7, 5))
    with mock.patch.object(type(current_platform), "get_device_capability", older):
        return facts(resolve(arguments))


def without_triton(arguments: dict[str, Any]) -> dict[str, Any]:
    with mock.patch.object(support, "HAS_TRITON", False):
        return facts(resolve(arguments))


def changed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Given `change`, values by path, set where vLLM itself wants more than is here."""
    change = arguments.pop("change")
    config = resolve(arguments)
    for path, value in change.items():
        part, _, name = path.partition(".")
        setattr(getattr(config, part), name, value)
    support.check_engine(config)
    return facts(config)


def xformers_obstacle(arguments: dict[str, Any]) -> str | None:
    """Why prompts are not attended by xformers, were it installed."""
    config = resolve(arguments)
    op = next(op for op in varlen.REGISTRY if op.name == "xformers")
    with (
        set_current_vllm_config(config),
        mock.patch.object(varlen, "find_spec", lambda name: "found"),
    ):
        return op.obstacle(varlen.Asked("cuda", torch.float16, 128, 0.0))


def ready(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the doctor says; there is no GPU for the ops."""
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        mock.patch.object(dispatch, "unavailable", lambda name: None),
    ):
        status = doctor.run()
    return {"status": status, "text": " ".join(output.getvalue().split())}


def main() -> None:
    load_general_plugins()
    todo, results = json.load(sys.stdin), {}
    for name, (what, arguments) in todo.items():
        try:
            results[name] = globals()[what](arguments)
        except TailorKVError as error:
            results[name] = {"refused": str(error)}
        except Exception as error:
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
    results["initialisations"] = initialisations
    sys.stdout.write("\n" + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
