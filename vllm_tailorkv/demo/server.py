"""A `vllm serve` of our own: started, watched and, whatever happens, stopped."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from pydantic import BaseModel, ValidationError, field_validator

from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.scripts import find_script

MODEL_NAME = "demo"
HOST = "127.0.0.1"

_POLL_SECONDS = 0.5
_STOP_GRACE_SECONDS = 10.0
_FEW_CORES = 4
_GIB = 2**30
# What the processes of a server need beside the KV cache; measured at 2 GiB for the demo model.
_PROCESS_BYTES = 3 * _GIB

_LOG_PREFIX = re.compile(r"^(\([^)]*\) *)?([A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] *)?")
_ERROR_LINE = re.compile(r"^(?P<type>[\w.]*(Error|Exception))\b|^[\w -]+: error:")
# What vLLM says last whenever an engine does not come up; the cause stands before it.
_CONSEQUENCES = ("Engine core initialization failed", "WorkerProc initialization failed")
_PLAN = "tailorkv_plan_info"
_USAGE = "vllm:kv_cache_usage_perc"


class ServerError(RuntimeError):
    """The server did not start, or failed. `log_lines` are the last errors of its log."""

    def __init__(self, message: str, log_lines: Sequence[str], log: Path) -> None:
        super().__init__(message)
        self.log_lines = tuple(log_lines)
        self.log = log


class TailorKVPlan(BaseModel):
    """What a server with the backend `tailorkv` tells of itself under `/metrics`.

    `*_bytes_per_token` count every layer and KV head; `num_blocks` and `block_size` are the
    cache's; `budget_tokens` is what a sparse layer reads in full precision in a decode step.
    """

    dense_layers: list[int]
    sparse_layers: list[int]
    num_kv_heads: int
    head_size: int
    placement: str
    host_bytes_per_token: float
    derived_bytes_per_token: float
    full_bytes_per_token: float
    num_blocks: int
    block_size: int
    budget_tokens: int
    bits: int
    index: str
    critical_channels: int

    @field_validator("dense_layers", "sparse_layers", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return list(filter(None, value.split(","))) if isinstance(value, str) else value

    @property
    def num_tokens(self) -> int:
        """What the cache holds. One block is vLLM's null block and holds no tokens."""
        return (self.num_blocks - 1) * self.block_size


@dataclass(frozen=True)
class ServerOptions:
    """How to start a server.

    Args:
        model: directory of the checkpoint.
        log: file for everything the server prints; replaced if it exists.
        max_model_len: longest sequence, prompt and completion, in tokens.
        cache_gib: memory for the KV cache on a CPU.
        backend: name of the attention backend; None leaves the choice to vLLM.
        config: options of the backend, the value of "tailorkv" in vLLM's additional config.
        is_eager: whether to do without compiling the model, which takes a CPU a minute.
        port: TCP port on the loopback interface; 0 for any that is free.
        dtype: of the model.
        arguments: further ones of `vllm serve`.
    """

    model: Path
    log: Path
    max_model_len: int
    cache_gib: int
    backend: str | None = None
    config: dict[str, object] | None = None
    is_eager: bool = False
    port: int = 0
    dtype: str = "bfloat16"
    arguments: tuple[str, ...] = ()


def cache_gib_for(num_tokens: int, bytes_per_token: float, weight_bytes: int = 0) -> int:
    """Whole GiB of KV cache for `num_tokens`, with room for as many again.

    Args:
        num_tokens: of the longest sequence.
        bytes_per_token: K and V of a token in all layers.
        weight_bytes: of a model that is larger than the demo's own.

    Raises:
        TailorKVError: if this machine does not have it.
    """
    gib = max(1, -(-int(2 * num_tokens * bytes_per_token) // _GIB))
    available = _available_bytes()
    process = _PROCESS_BYTES + weight_bytes
    if gib * _GIB + process > available:
        raise TailorKVError(
            f"{num_tokens} tokens need {gib} GiB of KV cache and {process / _GIB:.0f} GiB for "
            f"vLLM; {available / _GIB:.1f} GiB are available"
        )
    return gib


class VllmServer:
    """A running `vllm serve`, to be used in a `with` statement, or started and stopped.

    The server leads a process group of its own, so that a Ctrl-C in the terminal reaches only
    the demo, which then stops the server and all its children.
    """

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self._port = options.port or _free_port()
        # A second name of the model, which no other server has.
        self._name = f"{MODEL_NAME}-{uuid.uuid4().hex}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Root of the server's HTTP interface."""
        return f"http://{HOST}:{self._port}"

    @property
    def port(self) -> int:
        """TCP port of the HTTP interface."""
        return self._port

    @property
    def pid(self) -> int:
        """Of the process that serves HTTP; the others descend from it."""
        return self._started().pid

    @property
    def log(self) -> Path:
        """Where the server's output goes."""
        return self._options.log

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, without waiting until it answers; `stop` must follow."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                _command(self._options, self._port, self._name),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(self._options),
                start_new_session=True,
            )

    def stop(self) -> None:
        """End the server and every process it has started; nothing if there is none."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def wait(self, timeout: float) -> int | None:
        """Exit status of a server that ends by itself; None if it runs on for so many seconds."""
        try:
            return self._started().wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def wait_until_healthy(self, on_wait: Callable[[str], None], timeout: float) -> None:
        """Return when the server answers. `on_wait` gets the newest log line, twice a second.

        It must name what was started: another program may have taken the port meanwhile.

        Raises:
            ServerError: the server ended, or took longer than `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            self.check_alive()
            if self._is_the_one():
                return
            if time.monotonic() > deadline:
                raise self.error(f"vLLM was not ready after {timeout:.0f} s")
            on_wait(self.last_log_line())
            time.sleep(_POLL_SECONDS)

    def _is_the_one(self) -> bool:
        """Whether what answers at the port is the server that was started, and healthy."""
        health = self._get("/health")
        if health is None or not health.is_success:
            return False
        models = self._get("/v1/models")
        return models is not None and f'"{self._name}"' in models.text

    def _get(self, path: str) -> httpx.Response | None:
        """What it answers, if it does; no proxy is asked for a port of this machine's own."""
        try:
            return httpx.get(f"{self.url}{path}", timeout=2.0, trust_env=False)
        except httpx.TransportError:
            return None

    def check_alive(self) -> None:
        """Raises ServerError if the server has ended."""
        status = self._started().poll()
        if status is not None:
            raise self.error(f"vLLM ended with exit status {status}")

    def last_log_line(self) -> str:
        """The newest line of the log that says something, without vLLM's prefix."""
        return next(reversed(self._log_lines()), "")

    def cached_tokens(self) -> int | None:
        """Tokens in the KV cache, requests in progress only; None if the server does not say."""
        sizes, usage = self._labels("vllm:cache_config_info"), self._value(_USAGE)
        if usage is None or not {"num_gpu_blocks", "block_size"} <= sizes.keys():
            return None
        return round(usage * int(sizes["num_gpu_blocks"]) * int(sizes["block_size"]))

    def plan(self) -> TailorKVPlan | None:
        """What the backend `tailorkv` serves by, or None if the server has another backend."""
        labels, cache = self._labels(_PLAN), self._labels("vllm:cache_config_info")
        sizes = {"num_blocks": cache.get("num_gpu_blocks"), "block_size": cache.get("block_size")}
        try:
            return TailorKVPlan.model_validate({**labels, **sizes})
        except ValidationError:
            return None

    def _metric(self, name: str) -> Sample | None:
        """The first sample of a metric, or None if the server does not tell it."""
        response = self._get("/metrics")
        if response is None or not response.is_success:
            return None
        families = text_string_to_metric_families(response.text)
        samples = (sample for family in families for sample in family.samples)
        return next((sample for sample in samples if sample.name == name), None)

    def _labels(self, name: str) -> dict[str, str]:
        sample = self._metric(name)
        return {} if sample is None else sample.labels

    def _value(self, name: str) -> float | None:
        sample = self._metric(name)
        return None if sample is None else sample.value

    def error(self, message: str) -> ServerError:
        """An error to raise, with what the log says of its cause."""
        errors = [
            line
            for line in self._log_lines()
            if _ERROR_LINE.match(line) and not any(text in line for text in _CONSEQUENCES)
        ]
        causes = list(dict.fromkeys(errors)) or self._log_lines()
        return ServerError(message, causes[-3:], self.log)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server is not started")
        return self._process

    def _log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _log_lines(self) -> list[str]:
        lines = (_LOG_PREFIX.sub("", line).strip() for line in self._log_text().splitlines())
        return [line for line in lines if line and not line.startswith("nanobind:")]


def _command(options: ServerOptions, port: int, name: str) -> list[str]:
    vllm = find_script("vllm")
    if vllm is None:
        raise TailorKVError(
            "the command vllm is neither beside this Python nor on the PATH; vllm-tailorkv doctor "
            "says what is missing"
        )
    command = [
        vllm,
        *("serve", str(options.model)),
        *("--served-model-name", MODEL_NAME, name),
        *("--host", HOST, "--port", str(port)),
        *("--dtype", options.dtype),
        *("--max-model-len", str(options.max_model_len)),
        "--enable-prefix-caching",
        "--disable-uvicorn-access-log",
        *options.arguments,
    ]
    if options.is_eager:
        command.append("--enforce-eager")
    if options.backend is not None:
        command += ["--attention-backend", options.backend]
    if options.config is not None:
        command += ["--additional-config", json.dumps({"tailorkv": options.config})]
    return command


def _environment(options: ServerOptions) -> dict[str, str]:
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": str(options.cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # It would ask clients for a key that they do not have.
    environment.pop("VLLM_API_KEY", None)
    if len(os.sched_getaffinity(0)) <= _FEW_CORES:
        # vLLM would leave one to its API server. Of two, that is half: prefill of 16k tokens took
        # 24 s, with both 13 s, and decoding the same.
        environment.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then make sure of it and of every process it has started."""
    try:
        process.terminate()
        process.wait(_STOP_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Children can outlive a server that ended while it was starting; they are in its group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _available_bytes() -> int:
    """Memory that new processes can have without swapping."""
    text = Path("/proc/meminfo").read_text()
    match = re.search(r"^MemAvailable: *(\d+) kB$", text, re.MULTILINE)
    if match is None:
        raise OSError("/proc/meminfo does not tell the available memory")
    return int(match[1]) * 1024
