"""An engine whose workers Ray has started: what it says, what they know, and how one's end is told.

For `tests/integration/ray_check.py`, in a process of its own: Ray and vLLM leave threads and
settings behind. The cluster is this machine. It declares GPUs that nobody has, and a platform
plugin lets vLLM ask for them (`ray_platform.py`).
"""

import faulthandler
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
LIMIT_SECONDS = 240
EXECUTORS = {"older": "0", "newer": "1"}
"""vLLM's two executors for Ray, by what `VLLM_USE_RAY_V2_EXECUTOR_BACKEND` calls them."""


def install_platform(folder: Path) -> None:
    """Let vLLM find the plugin, here and in processes that inherit the environment."""
    info = folder / "ray_platform-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-platform\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nray_cpu = ray_platform:name\n")
    paths = [str(folder), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    sys.path.insert(0, str(folder))


def worker_state(worker: Any) -> dict[str, Any]:
    """What a worker knows; runs there."""
    import ray

    from vllm_tailorkv.attention.carried import plan_of

    plan = plan_of(worker.vllm_config)
    context = worker.vllm_config.compilation_config.static_forward_context
    kinds = {
        name: layer.impl.spec.layout.kind.value
        for name, layer in context.items()
        if type(layer.impl).__name__ == "TailorKVImpl"
    }
    return {
        "pid": os.getpid(),
        "actor": ray.get_runtime_context().get_actor_id(),
        "options": plan.config.model_dump(mode="json"),
        "kinds": kinds,
    }


def greedy(engine: Any, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Greedy continuations, all in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    found: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
    return [found[str(i)] for i in range(len(prompts))]


def end_of(engine: Any, pid: int, prompt: list[int]) -> dict[str, Any]:
    """Kill a worker, ask again, and say how that ended and after how many seconds."""
    os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    try:
        greedy(engine, [prompt], 8)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - start}
    return {"error": "", "seconds": time.monotonic() - start}


def main(asked: dict[str, Any], output: Path) -> None:
    """Start the engine and ask it.

    Args:
        asked: `executor`, older or newer; `workers`; `prompts` and `steps`; `engine`, arguments of
            vLLM's, among them a `profile` that is a path.
        output: gets what was found, as JSON.
    """
    # Says where it stands, if it does not end.
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    os.environ["VLLM_USE_RAY_V2_EXECUTOR_BACKEND"] = EXECUTORS[asked["executor"]]
    # For `worker_state`.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    # Ray would keep one in the user's home.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # The older one would send tensors between GPUs.
    os.environ["VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE"] = "shm"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        install_platform(Path(folder))
        import ray
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        started = time.monotonic()
        ray.init(
            "local",
            num_cpus=1,
            num_gpus=asked["workers"],
            include_dashboard=False,
            _temp_dir=folder,
        )
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        seconds = {"ray": time.monotonic() - started}
        arguments = EngineArgs(distributed_executor_backend="ray", **asked["engine"])
        config = arguments.create_engine_config()
        # Workers on other machines would not see the file.
        Path(asked["engine"]["additional_config"]["tailorkv"]["profile"]).unlink()
        engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        seconds["engine"] = time.monotonic() - started
        found = {
            "tokens": greedy(engine, asked["prompts"], asked["steps"]),
            "workers": engine.collective_rpc(worker_state),
        }
        seconds["tokens"] = time.monotonic() - started
        found["end"] = end_of(engine, found["workers"][-1]["pid"], asked["prompts"][0])
        found["seconds"] = seconds
        output.write_text(json.dumps(found))
        ray.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
