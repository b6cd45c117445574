"""Runs tests with the C++ ops under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/support/sanitize.py [arguments of pytest]

builds the ops so (see TAILORKV_SANITIZE in setup.py), then runs pytest with the sanitizers'
libraries loaded first, as they must be in a Python that has none itself. What they find ends the
process with a report, and the last example that a test drew follows it. `TAILORKV_EXAMPLES` says
how many examples a property is tried with.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXTENSION = ROOT / "build/sanitize/vllm_tailorkv/_cpu.abi3.so"
LAST_EXAMPLE = ROOT / "build/sanitize/last_example.txt"
COMPILE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-wrapv"]
"""Of C++ that a test compiles itself."""

DEFAULT_TESTS = [
    f"tests/kernels/{name}.py" for name in ("test_sanitizers", "test_any_shape", "test_cuda_ops")
]

OPTIONS = {
    # Python and torch keep much until they end.
    "detect_leaks": 0,
    # Memory that was never written is full of NaN.
    "max_malloc_fill_size": 1 << 30,
    "malloc_fill_byte": 0xFF,
    # Python's own handlers, and those of tests that expect faults.
    "handle_segv": 0,
    "handle_sigbus": 0,
    # One report of a fault is enough, and the process ends at once.
    "halt_on_error": 1,
}


def active() -> bool:
    """Whether this process runs under the sanitizers."""
    return os.environ.get("TAILORKV_SANITIZED") == "1"


def without_preload() -> dict[str, str]:
    """The environment for programs that tests start and that are no tests themselves."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def environment() -> dict[str, str]:
    """The environment of a Python that can load the sanitized ops."""
    libraries = []
    # libstdc++ too, or the sanitizers would not find what throws exceptions.
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = ["gcc", f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            raise SystemExit(f"{name} was not found; the sanitizers need gcc's libraries")
        libraries.append(path)
    return os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": ":".join(f"{name}={value}" for name, value in OPTIONS.items()),
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TAILORKV_SANITIZED": "1",
    }


def build() -> None:
    """Build the sanitized ops, where a source has changed."""
    # torch compiles several sources at a time if it finds ninja.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    print("== Building the C++ ops with sanitizers", flush=True)
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=ROOT,
        env=os.environ | {"TAILORKV_SANITIZE": "1", "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise SystemExit(f"{result.stdout}The sanitized ops cannot be built")


def load_ops() -> None:
    """Make the sanitized ops those of `vllm_tailorkv`; before anything else loads them."""
    spec = importlib.util.spec_from_file_location("vllm_tailorkv._cpu", EXTENSION)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def poison(address: int, size: int) -> None:
    """From now on an access to these bytes is a fault; no effect without sanitizers."""
    _mark("__asan_poison_memory_region", address, size)


def unpoison(address: int, size: int) -> None:
    """The opposite, for memory that is given back; what came from malloc needs it not."""
    _mark("__asan_unpoison_memory_region", address, size)


def _mark(function: str, address: int, size: int) -> None:
    if active() and size > 0:
        mark = getattr(ctypes.CDLL(None), function)
        mark(ctypes.c_void_p(address), ctypes.c_size_t(size))


def note(example: object) -> None:
    """What to print should the process end here."""
    if active():
        LAST_EXAMPLE.write_text(f"{example}\n")


def report_of(fault: Callable[[], object]) -> str:
    """What the sanitizers say when a copy of this process does this; "" if it goes well."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        fault()
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        report = pipe.read()
    return report if os.waitpid(child, 0)[1] != 0 else ""


def main(arguments: list[str]) -> int:
    """Build, run pytest."""
    build()
    LAST_EXAMPLE.unlink(missing_ok=True)
    # Not captured, or a report would be lost with the process.
    command = [sys.executable, "-m", "pytest", "-s", *(arguments or DEFAULT_TESTS)]
    code = subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode
    if code != 0 and LAST_EXAMPLE.exists():
        print("The last example:", LAST_EXAMPLE.read_text(), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
