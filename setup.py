"""Build of vllm_tailorkv: the package, its C++ ops for CPUs and its CUDA op.

What the distribution is called, says of itself and needs: pyproject.toml.

torch and vLLM come from the environment (their wheels differ by platform), so install with
`pip install --no-build-isolation .` where torch is installed.

The CUDA op needs nvcc alone, neither a GPU nor a CUDA build of torch:
    TAILORKV_CUDA        `auto` (default): build it where nvcc is found; `1`: fail where it is
                         not; `0`: leave it out.
    TAILORKV_CUDA_ARCHS  compute capabilities as "80 90"; default: those from 80 to 120 that
                         nvcc knows. The highest is kept as PTX too, for later GPUs.
nvcc is looked for in CUDA_HOME, on PATH and in /usr/local/cuda.

    TAILORKV_SANITIZE    `1`: build the C++ ops alone, with AddressSanitizer and
                         UndefinedBehaviorSanitizer, into build/sanitize: tests load them from
                         there (tests/support/sanitize.py, `make sanitize`). Default: `0`.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "vllm_tailorkv: torch is needed to build. Install it first, then run "
        "`pip install --no-build-isolation .`"
    ) from error

TOP_LEVEL = ("kernels", "patches")
"""Packages whose folders stand beside `vllm_tailorkv/` (which has symlinks to them)."""

SOURCES = (
    "binding.cpp",
    "isa.cpp",
    "support.cpp",
    "kernels_avx512_gfni.cpp",
    "kernels_avx512.cpp",
    "kernels_avx2.cpp",
    "kernels_portable.cpp",
    "exact_avx512_bf16.cpp",
    "exact_amx.cpp",
)

STABLE_ABI = [
    "-std=c++20",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DTORCH_STABLE_ONLY",
    "-DPy_LIMITED_API=0x030b0000",
]

SANITIZED = Path("build/sanitize")
"""Where the sanitized C++ ops go, so that they never take the place of those that users run."""
SANITIZE_FLAGS = [
    # A third of the time that -O1 takes to compile these, and half as fast.
    "-Og",
    "-g1",
    "-fsanitize=address,undefined",
    # AddressSanitizer sees the accesses that these would announce.
    "-fno-sanitize=null,object-size,vptr,nonnull-attribute,returns-nonnull-attribute",
    "-fno-sanitize-recover=all",
    # Python's own flags have -fwrapv, which makes an overflow defined.
    "-fno-wrapv",
    # gcc 12 warns of the parts of vectors that its own intrinsics leave undefined.
    "-Wno-maybe-uninitialized",
    "-fno-omit-frame-pointer",
]

CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
NVCC_FLAGS = ("-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")


def packages() -> list[str]:
    """Every package once, whether the symlinks are there, as in a clone, or not, as in an sdist."""
    # Not find_packages: `data` holds JSON files only.
    found = find_namespace_packages(include=["vllm_tailorkv*"], exclude=["*.__pycache__*"])
    for name in TOP_LEVEL:
        found += [f"vllm_tailorkv.{name}"]
        found += [f"vllm_tailorkv.{name}.{inner}" for inner in find_packages(where=name)]
    return sorted(set(found))


def find_nvcc() -> Path | None:
    """CUDA's compiler, or None where there is none."""
    folders = [os.environ["CUDA_HOME"]] if os.environ.get("CUDA_HOME") else []
    on_path = shutil.which("nvcc")
    candidates = [Path(folder) / "bin" / "nvcc" for folder in folders]
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    return next((path for path in candidates if path.is_file()), None)


def ask_nvcc(nvcc: Path, *arguments: str) -> str:
    """What nvcc prints."""
    command = [str(nvcc), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cuda_archs(nvcc: Path) -> list[str]:
    """The compute capabilities to compile for, as nvcc writes them, in rising order."""
    known = set(re.findall(r"compute_(\w+)", ask_nvcc(nvcc, "--list-gpu-arch")))
    wanted = re.split(r"[\s,;]+", os.environ.get("TAILORKV_CUDA_ARCHS", "").strip())
    if wanted == [""]:
        return [arch for arch in CUDA_ARCHS if arch in known]
    if unknown := [arch for arch in wanted if arch not in known]:
        raise SystemExit(
            f"TAILORKV_CUDA_ARCHS={' '.join(wanted)}: {nvcc} does not know {' '.join(unknown)}; "
            f"choose from {' '.join(sorted(known, key=int))}"
        )
    return sorted(wanted, key=int)


def cuda_library(nvcc: Path) -> Path:
    """The folder of the static CUDA runtime of this nvcc."""
    # nvcc may be a script or a link elsewhere, so ask it.
    command = [str(nvcc), "--dryrun", "-x", "cu", "/dev/null"]
    plan = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    home = Path(top[1]).resolve() if top else nvcc.resolve().parent.parent
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (home / folder / "libcudart_static.a").is_file():
            return home / folder
    raise SystemExit(f"libcudart_static.a was not found under {home}; install CUDA's runtime")


def cuda_extension() -> Extension | None:
    """The CUDA op, or None where it is not to be built."""
    wanted = os.environ.get("TAILORKV_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"TAILORKV_CUDA={wanted} is unknown; choose auto, 0 or 1")
    nvcc = find_nvcc() if wanted != "0" else None
    if nvcc is None:
        if wanted == "1":
            raise SystemExit(
                "TAILORKV_CUDA=1, but nvcc was not found; install the CUDA toolkit, or name "
                "its folder in CUDA_HOME"
            )
        return None
    extension = CppExtension(
        "vllm_tailorkv._cuda",
        ["csrc/cuda/binding.cpp"],
        depends=[str(path) for path in [*cuda_headers(), *shared_headers()]],
        py_limited_api=True,
        extra_compile_args=["-O2", *STABLE_ABI],
        library_dirs=[str(cuda_library(nvcc))],
        libraries=["cudart_static", "dl", "rt", "pthread"],
    )
    extension.nvcc = nvcc
    return extension


def cuda_headers() -> list[Path]:
    """What the CUDA sources include."""
    return sorted(path for path in Path("csrc/cuda").iterdir() if path.suffix in (".h", ".cuh"))


def shared_headers() -> list[Path]:
    """What the bindings of both extensions include."""
    return sorted(Path("csrc").glob("*.h"))


def sanitize() -> bool:
    """Whether sanitized C++ ops are asked for."""
    wanted = os.environ.get("TAILORKV_SANITIZE", "0")
    if wanted not in ("0", "1"):
        raise SystemExit(f"TAILORKV_SANITIZE={wanted} is unknown; choose 0 or 1")
    return wanted == "1"


class Build(BuildExtension):
    """Compiles the CUDA kernel with nvcc, then the rest like any extension.

    torch's own support for CUDA sources needs a CUDA build of torch.
    """

    def finalize_options(self) -> None:
        """Where things go: sanitized ops, whoever builds them, into a folder of their own."""
        super().finalize_options()
        if sanitize():
            self.inplace = False
            self.build_lib, self.build_temp = str(SANITIZED), str(SANITIZED / "objects")

    def build_extension(self, ext: Extension) -> None:
        """Build one extension."""
        if hasattr(ext, "nvcc"):
            ext.extra_objects = [str(self.compile_kernels(ext.nvcc))]
        super().build_extension(ext)

    def compile_kernels(self, nvcc: Path) -> Path:
        """Compile `launch.cu` to an object file, where it or its headers have changed."""
        source, target = Path("csrc/cuda/launch.cu"), Path(self.build_temp) / "launch.o"
        archs = cuda_archs(nvcc)
        command = [str(nvcc), *NVCC_FLAGS, f"-DTAILORKV_CUDA_ARCHS={' '.join(archs)}"]
        for arch in archs:
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command += ["-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
        command += ["-c", str(source), "-o", str(target)]
        stamp = target.with_suffix(".command")
        inputs = [source, *cuda_headers()]
        if (
            target.exists()
            and stamp.exists()
            and stamp.read_text() == "\n".join(command)
            and all(path.stat().st_mtime < target.stat().st_mtime for path in inputs)
        ):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        print("vllm_tailorkv:", " ".join(command), flush=True)
        subprocess.run(command, check=True)
        stamp.write_text("\n".join(command))
        return target


cpu_extension = CppExtension(
    "vllm_tailorkv._cpu",
    [f"csrc/cpu/{source}" for source in SOURCES],
    depends=[str(path) for path in [*sorted(Path("csrc/cpu").glob("*.h")), *shared_headers()]],
    py_limited_api=True,
    extra_compile_args=[
        *(SANITIZE_FLAGS if sanitize() else ["-O3"]),
        "-fopenmp",
        # A multiplication and an addition must not be contracted: codes agree to the bit.
        "-ffp-contract=off",
        *STABLE_ABI,
    ],
    extra_link_args=["-fopenmp", *(SANITIZE_FLAGS if sanitize() else [])],
)
cuda_ops = None if sanitize() else cuda_extension()

setup(
    packages=packages(),
    package_dir={f"vllm_tailorkv.{name}": name for name in TOP_LEVEL},
    package_data={"vllm_tailorkv": ["py.typed"], "vllm_tailorkv.data": ["*.json"]},
    ext_modules=[ext for ext in (cpu_extension, cuda_ops) if ext is not None],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
