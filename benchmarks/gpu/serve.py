"""Whether and how fast the real vLLM serves on a GPU, step by step, each in under nine minutes.

    ops     build, test and measure the ops alone: benchmarks/gpu/run.sh
    pool    a host pool of 8 GiB, allocated, written, read and released, three times
    eager   a small random model, without graphs: tokens near FLASH_ATTN's where all tokens are
            attended, and the same in chunks and after prefix hits
    graphs  the same with CUDA graphs of decode steps, and with vLLM's default: tokens as without
    speed   Llama-3.1-8B's shape with random weights, in 24 GiB of device memory, without and with
            rows kept there, against FLASH_ATTN (K and V in bf16 and in fp8) with all of it

Each step writes OUT/STEP.jsonl, a line as soon as there is something to say, with what it ran on;
engines run one after another, each in a process of its own, whose log is OUT/logs/NAME.log. What
follows a failure still runs. The exit status is 1 if anything failed; the reasons are the last
lines. The same command goes on with what is missing: engines that have answered are not asked
again (eager, graphs), nor is what was measured measured again (speed).

On a CPU, `--rehearse` takes every step to its end, tiny: vLLM's second model runner with Triton
interpreted, a stand-in for CUDA graphs, and vLLM's own CPU attention instead of FLASH_ATTN.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

from provenance import provenance  # noqa: E402
from random_checkpoint import save_random_checkpoint  # noqa: E402
from rehearsal import ENVIRONMENT  # noqa: E402
from served import (  # noqa: E402
    SELECTED_TOLERANCE,
    TOLERANCE,
    VARIANTS,
    compare,
    engine_name,
    options_of,
    workload,
)
from speed.command import positive  # noqa: E402
from speed.kept import kept_records  # noqa: E402
from speed.models import MODELS, Model  # noqa: E402

from vllm_tailorkv.arguments import json_object  # noqa: E402

EXAMPLES = """\
examples:
  python benchmarks/gpu/serve.py pool eager graphs speed --out /tmp/rehearsal --rehearse
  python benchmarks/gpu/serve.py ops --out $OUT
  python benchmarks/gpu/serve.py pool eager --out $OUT --seconds 250
  python benchmarks/gpu/serve.py eager graphs --out $OUT --at-once 8 --dtypes bfloat16,float16
  python benchmarks/gpu/serve.py speed --out $OUT --device-gib 24
  python benchmarks/gpu/serve.py speed --out $OUT --cases 32768x1,131072x1 --engines ours,bf16
"""
CASES = "32768x1,32768x8,32768x16,131072x1,131072x4"
MODES = ("FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
ENGINES = {"ours": 1, "hot": 1, "bf16": 1, "fp8": 1}
"""Of speed, and how they share its time. hot: ours, with rows kept on the device."""
HOT_TOKENS = 4096
SHARE_ON_DEVICE = 0.05
"""Of the bytes of K and V in full precision, what the device may hold at most."""
SMALL = 0.08
"""Of a GPU's memory, what an engine of a small model may take: several are there at once."""
GRACE = 20
"""Seconds that a process may take beyond its own deadline before it is killed."""


@dataclass(frozen=True)
class Sizes:
    """What differs between a GPU and a rehearsal.

    pool_gib: of the pool alone; engine_pool_gib: of the pool of a small model's engine.
    layers, beyond, chunk, cache_bytes: of small models, with more tokens than any context has.
    speed_chunk, warm_steps, output_tokens: of speed; steps that do not count, and those that do.
    """

    pool_gib: float
    engine_pool_gib: float
    layers: int
    block: int
    beyond: int
    chunk: int
    cache_bytes: int
    speed_chunk: int
    warm_steps: int
    output_tokens: int


ON_GPU = Sizes(
    pool_gib=8,
    engine_pool_gib=2,
    layers=4,
    block=128,
    beyond=1024,
    chunk=128,
    cache_bytes=1 << 30,
    speed_chunk=8192,
    warm_steps=3,
    output_tokens=48,
)
TINY = Sizes(
    pool_gib=1 / 32,
    engine_pool_gib=0.05,
    layers=2,
    block=64,
    beyond=128,
    chunk=32,
    cache_bytes=64 << 20,
    speed_chunk=256,
    warm_steps=1,
    output_tokens=2,
)
TINY_MODEL = Model(256, 256, 2, 4, 2, 320)
# Below the contexts, so that tokens are selected.
TINY_BUDGET = {"topk_tokens": 8, "recent_tokens": 16}
TINY_CASES = "40x1,70x2"


class Step:
    """A step: its results, what failed in it, and the time that it has left."""

    def __init__(self, name: str, args: argparse.Namespace, hardware: dict[str, Any]) -> None:
        self.name = name
        self.args = args
        self.sizes = TINY if args.rehearse else ON_GPU
        self.settings = {"step": name, "rehearsal": args.rehearse, "hardware": hardware}
        self.deadline = time.monotonic() + args.seconds
        self.failures: list[str] = []
        self.path = args.out / f"{name}.jsonl"
        self.origin = provenance() | ({"revision": args.revision} if args.revision else {})

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def fresh(self) -> None:
        """Leave no results of an earlier run."""
        self.path.unlink(missing_ok=True)

    def write(self, **record: Any) -> None:
        """One line; `failures` in it are the step's."""
        self.fail(record.get("case", ""), record.get("failures", []))
        line = json.dumps(self.settings | record | self.origin)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        told = {name: value for name, value in record.items() if name != "failures"}
        print(f"   {json.dumps(told)[:300]}", flush=True)

    def fail(self, where: str, reasons: list[str]) -> None:
        """Note what the exit status is to tell."""
        for reason in reasons:
            self.failures.append(f"{self.name}: {where}: {reason}")
            print(f"!! {self.failures[-1]}", flush=True)

    def run(self, name: str, job: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
        """Do a job in a process of its own: its records, where it ends with an error too."""
        return self.follow(name, job, seconds, lambda record: None)

    def follow(
        self,
        name: str,
        job: dict[str, Any],
        seconds: float,
        on_record: Callable[[dict[str, Any]], None],
    ) -> list[dict[str, Any]]:
        """As `run`, and tell of every record as it comes."""
        if seconds <= 0:
            self.fail(name, ["not run: the time is over"])
            return []
        print(f"== {self.args.seconds - self.left:4.0f} s  {self.name}: {name}", flush=True)
        logs = self.args.out / "logs"
        logs.mkdir(exist_ok=True)
        path = logs / f"{name}.json"
        path.write_text(json.dumps(job))
        records, error = [], None
        reader, writer = os.pipe()
        with (logs / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "serve_engine.py"), str(path), str(writer)],
                env=environment(self.args.rehearse, job),
                stdout=log,
                stderr=log,
                pass_fds=(writer,),
                start_new_session=True,
            )
            os.close(writer)
            late = threading.Timer(seconds + GRACE, stop, [process])
            late.start()
            try:
                with os.fdopen(reader) as events:
                    for line in events:
                        event = json.loads(line)
                        error = event.get("error", error)
                        if "record" in event:
                            records.append(event["record"])
                            on_record(event["record"])
                status = process.wait()
            finally:
                late.cancel()
                stop(process)
        if error or status:
            self.fail(name, [error or f"its process ended with status {status}; see its log"])
        return records


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process and those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def environment(rehearse: bool, job: dict[str, Any]) -> dict[str, str]:
    """Of the process that does a job."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    values = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if find_spec("flashinfer") is None:
        # Else vLLM takes its sampler for granted.
        values |= {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    if rehearse:
        values |= {"OMP_NUM_THREADS": "1"}
    if job.get("as_on_gpu"):
        values |= ENVIRONMENT
    return values


def ops(step: Step) -> None:
    """Run the script that needs no vLLM."""
    step.fresh()
    command = ["bash", str(HERE / "run.sh")]
    command += ["--rehearse"] if step.args.rehearse else []
    folder = step.args.out / "ops"
    values = os.environ | {"PYTHON": sys.executable, "SECONDS_IN_ALL": str(int(step.left))}
    process = subprocess.Popen([*command, str(folder)], env=values, start_new_session=True)
    try:
        status = process.wait(step.left + GRACE)
        failures = [f"run.sh ended with {status}"] if status else []
    except subprocess.TimeoutExpired:
        failures = ["run.sh did not end in time"]
    finally:
        stop(process)
    step.write(case="run.sh", results=folder.name, failures=failures)


def pool(step: Step) -> None:
    """A host pool, three times."""
    step.fresh()
    job = {
        "kind": "pool",
        "device": "cpu" if step.args.rehearse else "cuda",
        "gib": step.sizes.pool_gib,
        "rounds": 3,
    }
    step.follow("pool", job, step.left, lambda record: step.write(**record))


class Answers:
    """What the engines of a step say to the workload, asked once and kept in OUT/engines."""

    def __init__(self, step: Step, model: Path) -> None:
        self.step = step
        self.model = model
        self.batches = workload(step.sizes.block, step.args.rehearse)
        self.failed: set[str] = set()
        self.folder = step.args.out / "engines"
        self.folder.mkdir(exist_ok=True)

    def of(self, dtype: str, variant: str, mode: str = "eager") -> dict[str, Any] | None:
        """By batch; None if the engine failed.

        Args:
            variant: of `VARIANTS`, or `peer`.
        """
        step, name = self.step, engine_name(dtype, variant, mode)
        if name in self.failed:
            return None
        job = self._job(dtype, variant, mode)
        origin = [step.settings["hardware"], step.origin["revision"]]
        made_of = {"job": job, "origin": origin}
        path = self.folder / f"{name}.json"
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept["made_of"] == made_of:
                return kept["answers"]
        found: dict[str, Any] = {}

        def on_record(record: dict[str, Any]) -> None:
            if "answers" in record:
                found[record["case"]] = record.pop("answers")
            batch = record.pop("case")
            step.write(case=f"{name} {batch}", **record, failures=wrong(record))

        def wrong(record: dict[str, Any]) -> list[str]:
            graphs = mode in MODES
            if "counted" not in record:
                resolved = step.args.rehearse or not graphs or mode in record["cudagraph_mode"]
                return [] if resolved else [f"graphs are {record['cudagraph_mode']}"]
            failures = []
            if graphs and not record["counted"]["run_fullgraph"]:
                failures.append("no graph was replayed")
            decodes = ("quantized_decode_attention", "retrieve_attention")
            if variant != "peer" and not graphs and not all(record["counted"][x] for x in decodes):
                failures.append("the tailored ops did not serve")
            return failures

        step.follow(name, job, step.left, on_record)
        if len(found) < len(self.batches):
            self.failed.add(name)
            return None
        path.write_text(json.dumps({"made_of": made_of, "answers": found}))
        return found

    def _job(self, dtype: str, variant: str, mode: str) -> dict[str, Any]:
        rehearse, sizes = self.step.args.rehearse, self.step.sizes
        graphs = mode in MODES
        values: dict[str, Any] = {
            "model": str(self.model),
            "dtype": dtype,
            "max_model_len": sizes.beyond,
            "max_num_seqs": 8,
            "enforce_eager": rehearse or not graphs,
            "disable_log_stats": False,
            "seed": 0,
            "kv_cache_memory_bytes": sizes.cache_bytes,
        }
        if rehearse:
            values["async_scheduling"] = False
        else:
            values["gpu_memory_utilization"] = SMALL
        if mode == "chunked":
            values |= {"max_num_batched_tokens": sizes.chunk, "enable_prefix_caching": False}
        elif mode in MODES and not rehearse:
            values["compilation_config"] = self.step.args.compilation | {"cudagraph_mode": mode}
        if variant == "peer":
            values |= {} if rehearse else {"attention_backend": "FLASH_ATTN"}
            return {"kind": "tokens", "engine": values, "batches": self.batches}
        values |= ours(options_of(variant, sizes.beyond), sizes.block, sizes.engine_pool_gib)
        return {
            "kind": "tokens",
            "engine": values,
            "batches": self.batches,
            "forced": variant == "everything",
            "as_on_gpu": rehearse,
            "graphs": mode if rehearse and graphs else None,
        }

    def ask(self, engines: Iterable[tuple[str, str, str]]) -> None:
        """Several engines beside each other, by dtype, variant and mode."""
        with ThreadPoolExecutor(self.step.args.at_once) as pool:
            list(pool.map(lambda one: self.of(*one), dict.fromkeys(engines)))

    def agree(self, found: tuple[str, str, str], expected: tuple[str, str, str]) -> None:
        """Check that two engines, named by dtype, variant and mode, say the same."""
        names = [engine_name(*one) for one in (found, expected)]
        answers = [self.of(*one) for one in (found, expected)]
        case = f"{names[0]} as {names[1]}"
        if answers[0] is None or answers[1] is None:
            self.step.write(case=case, failures=["an engine gave no answers"])
            return
        loose = SELECTED_TOLERANCE if found[1] in ("budget", "hot") else 1
        tolerance = loose * TOLERANCE[found[0]]
        summary, failures = compare(answers[0], answers[1], tolerance)
        self.step.write(case=case, **summary, failures=failures)


def ours(options: dict[str, Any], block: int, pool_gib: float | None) -> dict[str, Any]:
    """Arguments of an engine that tailorkv serves."""
    size = {} if pool_gib is None else {"host_pool_gib": pool_gib}
    return {
        "attention_backend": "tailorkv",
        "block_size": block,
        "additional_config": {"tailorkv": options | size},
    }


def checkpoint(step: Step) -> Path:
    """The small random model, made once."""
    folder = step.args.out.resolve() / "model"
    if not (folder / "model.safetensors").is_file():
        save_random_checkpoint(folder, "Llama", num_hidden_layers=step.sizes.layers)
    return folder


def eager(step: Step) -> None:
    """Against vLLM's own, and against itself in chunks without hits."""
    pairs = []
    for dtype in step.args.dtypes or ["bfloat16", "float16"]:
        for variant in step.args.variants:
            here = (dtype, variant, "eager")
            if variant != "budget":
                other = "budget" if variant == "hot" else "peer"
                pairs.append((here, (dtype, other, "eager")))
            pairs.append(((dtype, variant, "chunked"), here))
    check(step, pairs)


def graphs(step: Step) -> None:
    """Against itself without graphs."""
    check(
        step,
        [
            ((dtype, variant, mode), (dtype, variant, "eager"))
            for dtype in step.args.dtypes or ["bfloat16"]
            for variant in step.args.variants
            for mode in step.args.modes
        ],
    )


def check(step: Step, pairs: list[tuple[tuple[str, str, str], tuple[str, str, str]]]) -> None:
    """That the engines of each pair agree."""
    step.fresh()
    answers = Answers(step, checkpoint(step))
    answers.ask(engine for pair in pairs for engine in pair)
    for pair in pairs:
        answers.agree(*pair)


def speed(step: Step) -> None:
    """Cases of each engine that are not measured yet, ours first."""
    args, settings = step.args, step.settings
    shape = "tiny" if args.rehearse else "llama-3.1-8b"
    settings |= {"shape": shape, "device_gib": args.device_gib}
    remedy = "give another folder as --out, or remove it"
    kept = kept_records(step.path, settings, remedy) if step.path.is_file() else []
    model = TINY_MODEL if args.rehearse else MODELS[shape]
    cases = speed_cases(args.cases, step.sizes)
    # By this name the published profile is found.
    folder = args.out / "Llama-3.1-8B-Instruct"
    folder.mkdir(exist_ok=True)
    # The same for all engines, also where few cases are missing.
    limits = {
        "max_model_len": max(case["context"] + case["tokens"] for case in cases),
        "max_num_seqs": max(case["batch"] for case in cases),
    }
    model.write_config(folder, limits["max_model_len"])
    missing = {}
    for name in args.engines:
        done = {
            record["case"]
            for record in kept
            if record["engine"] == name and not record["failures"] and "stopped" not in record
        }
        missing[name] = [case for case in cases if case["case"] not in done]
    for at, name in enumerate(args.engines):
        if not missing[name]:
            continue
        waiting = sum(ENGINES[other] for other in args.engines[at:] if missing[other])
        seconds = step.left * ENGINES[name] / waiting
        measure_engine(step, name, missing[name], folder, limits, seconds)


def measure_engine(
    step: Step,
    name: str,
    cases: list[dict[str, Any]],
    folder: Path,
    limits: dict[str, int],
    seconds: float,
) -> None:
    """The cases of one engine, in so much time.

    Args:
        folder: the model's.
        limits: arguments of every engine.
    """
    args, sizes = step.args, step.sizes
    values = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32" if args.rehearse else "bfloat16",
        "max_num_batched_tokens": sizes.speed_chunk,
        "disable_log_stats": False,
        **limits,
    }
    mine = name in ("ours", "hot")
    if args.compilation:
        values["compilation_config"] = args.compilation
    if args.rehearse:
        values |= {
            "enforce_eager": True,
            "async_scheduling": False,
            "kv_cache_memory_bytes": sizes.cache_bytes,
        }
    else:
        total = step.settings["hardware"]["gpu_memory_mib"] / 1024
        values["gpu_memory_utilization"] = round(args.device_gib / total, 4) if mine else 0.92
    if mine:
        budget, pool_gib = (TINY_BUDGET, sizes.engine_pool_gib) if args.rehearse else ({}, None)
        kept = {"hot_tokens": HOT_TOKENS} if name == "hot" else {}
        values |= ours(budget | kept, sizes.block, pool_gib)
    elif not args.rehearse:
        values["attention_backend"] = "FLASH_ATTN"
        if name == "fp8":
            values["kv_cache_dtype"] = "fp8"
    job = {
        "kind": "speed",
        "engine": values,
        "cases": cases,
        "seconds": seconds - GRACE if seconds > 2 * GRACE else seconds,
        "case_seconds": args.case_seconds,
        "warm_steps": sizes.warm_steps,
        "output_tokens": sizes.output_tokens,
        "as_on_gpu": args.rehearse and mine,
        "graphs": MODES[1] if args.rehearse and mine else None,
    }
    seen = set()

    def on_record(record: dict[str, Any]) -> None:
        failures = []
        if record.get("share_of_full", 0) > SHARE_ON_DEVICE and not args.rehearse:
            failures.append(f"{record['share_of_full']:.1%} of K and V are on the device")
        if record.get("stopped"):
            failures.append("it did not end in time")
        seen.add(record["case"])
        step.write(engine=name, **record, failures=failures)

    step.follow(f"speed-{name}", job, seconds, on_record)
    for case in cases:
        if case["case"] not in seen:
            step.fail(f"{name} {case['case']}", ["not measured"])


def speed_cases(text: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Cases as `CONTEXTxBATCH,...`, each with enough tokens for its first request to go on."""
    cases = []
    for one in text.split(","):
        context, batch = map(int, one.split("x"))
        reading = -(-batch * context // (sizes.speed_chunk - batch))
        tokens = reading + sizes.output_tokens + 16
        cases.append({"case": one, "context": context, "batch": batch, "tokens": tokens})
    return cases


STEPS: dict[str, Callable[[Step], None]] = {
    "ops": ops,
    "pool": pool,
    "eager": eager,
    "graphs": graphs,
    "speed": speed,
}


def hardware(rehearse: bool) -> dict[str, Any]:
    """The GPU, as its driver tells.

    Raises:
        SystemExit: there is none.
    """
    if rehearse:
        return {"gpu": None}
    names = ("name", "driver_version", "memory.total", "pcie.link.gen.max", "pcie.link.width.max")
    query = f"--query-gpu={','.join(names)}"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"serve.py: there is no GPU ({error}); rehearse with --rehearse") from None
    name, driver, memory, *bus = (x.strip() for x in done.stdout.splitlines()[0].split(","))
    return {"gpu": name, "driver": driver, "gpu_memory_mib": int(memory), "pcie": " x".join(bus)}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def words(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("steps", nargs="+", choices=STEPS, metavar="STEP", help="see above")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny")
    parser.add_argument(
        "--seconds", type=float, default=500, help="of each step, at the most (%(default)s)"
    )
    parser.add_argument("--revision", help="the commit, where git cannot tell")
    parser.add_argument(
        "--dtypes", type=words, help="of eager (bfloat16,float16) and graphs (bfloat16)"
    )
    parser.add_argument(
        "--variants", type=words, default=list(VARIANTS), help=f"of {','.join(VARIANTS)} (all)"
    )
    parser.add_argument(
        "--modes", type=words, default=list(MODES), help=f"of graphs ({','.join(MODES)})"
    )
    parser.add_argument(
        "--at-once",
        type=positive,
        default=1,
        help="engines of eager and graphs beside each other (%(default)s)",
    )
    parser.add_argument(
        "--compilation",
        type=json_object,
        default={},
        metavar="JSON",
        help="vLLM's --compilation-config of engines with graphs; "
        "'{\"mode\": 0}' where torch is not the one that vLLM was made for",
    )
    parser.add_argument(
        "--device-gib", type=float, default=24, help="of tailorkv in speed (%(default)g)"
    )
    parser.add_argument("--cases", help=f"of speed, CONTEXTxBATCH ({CASES})")
    parser.add_argument("--case-seconds", type=float, default=150, help="of a case (%(default)g)")
    parser.add_argument(
        "--engines", type=words, default=list(ENGINES), help=f"of speed ({','.join(ENGINES)})"
    )
    args = parser.parse_args()
    if args.rehearse:
        args.dtypes = args.dtypes or ["float32"]
    args.cases = args.cases or (TINY_CASES if args.rehearse else CASES)
    for given, known in (
        (args.dtypes or [], TOLERANCE),
        (args.variants, VARIANTS),
        (args.modes, MODES),
        (args.engines, ENGINES),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(known)}")
    return args


def main() -> int:
    """Run the steps, one after another; the exit status."""
    args = arguments()
    # What ends this ends the engine that runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found = hardware(args.rehearse)
    args.out.mkdir(parents=True, exist_ok=True)
    failures = []
    for name in args.steps:
        step = Step(name, args, found)
        try:
            STEPS[name](step)
        except (OSError, ValueError) as error:
            step.fail("stopped", [str(error)])
        print(f"== {args.seconds - step.left:4.0f} s  {name}: done", flush=True)
        failures += step.failures
    for failure in failures:
        print(f"serve.py: {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
