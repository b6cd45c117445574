"""Build of vllm_tailorkv: the package and its C++ ops for CPUs.

torch and vLLM come from the environment (their wheels differ by platform), so install with
`pip install --no-build-isolation .` where torch is installed.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "vllm_tailorkv: torch is needed to build. Install it first, then run "
        "`pip install --no-build-isolation .`"
    ) from error

ROOT = Path(__file__).parent
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
)


def version() -> str:
    """The package's version, read without importing it."""
    text = (ROOT / "vllm_tailorkv" / "__init__.py").read_text()
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise SystemExit("vllm_tailorkv/__init__.py holds no __version__")
    return match[1]


def packages() -> list[str]:
    """Every package once; the symlinked ones by their names in `vllm_tailorkv`."""
    # Not find_packages: `data` holds JSON files only.
    inner = find_namespace_packages(include=["vllm_tailorkv*"], exclude=["*.__pycache__*"])
    outer = [f"vllm_tailorkv.{name}" for name in TOP_LEVEL if (ROOT / name).is_dir()]
    return sorted({*inner, *outer})


cpu_extension = CppExtension(
    "vllm_tailorkv._cpu",
    [f"csrc/cpu/{source}" for source in SOURCES],
    depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/cpu").glob("*.h"))],
    py_limited_api=True,
    extra_compile_args=[
        "-O3",
        "-std=c++20",
        "-fopenmp",
        # A multiplication and an addition must not be contracted: codes agree to the bit.
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DTORCH_STABLE_ONLY",
        "-DPy_LIMITED_API=0x030b0000",
    ],
    extra_link_args=["-fopenmp"],
)

setup(
    name="vllm_tailorkv",
    version=version(),
    description="TailorKV for vLLM: a tailored KV cache for long contexts",
    packages=packages(),
    package_dir={f"vllm_tailorkv.{name}": name for name in TOP_LEVEL},
    package_data={"vllm_tailorkv.data": ["*.json"]},
    python_requires=">=3.11",
    install_requires=[
        "httpx",
        "matplotlib",
        "openai",
        "packaging",
        "psutil",
        "pydantic",
        "rich",
        "safetensors",
        "tokenizers",
    ],
    extras_require={"vllm": ["vllm>=0.32,<0.33"], "test": ["pytest", "hypothesis"]},
    entry_points={
        "console_scripts": ["vllm-tailorkv = vllm_tailorkv.cli:main"],
        "vllm.general_plugins": ["tailorkv = vllm_tailorkv.plugin:register"],
    },
    ext_modules=[cpu_extension],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
