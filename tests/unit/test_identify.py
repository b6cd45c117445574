"""The prompt, the profile, the table and the picture of `identify`, without an engine."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.identify import command
from vllm_tailorkv.identify.command import main, output_path
from vllm_tailorkv.identify.plot import save_plot
from vllm_tailorkv.identify.problems import word_problems
from vllm_tailorkv.identify.prompt import build_prompt
from vllm_tailorkv.identify.report import bar, print_scores
from vllm_tailorkv.profile import (
    Identification,
    LayerScore,
    ModelShape,
    Profile,
    Prompt,
    load_profile,
    read_profile,
    write_profile,
)


def encode(text: str) -> list[int]:
    """A token a word."""
    return [len(word) for word in text.split()]


def prompt_of(**changes: Any) -> Any:
    arguments = {"file": None, "num_tokens": None, "longest": 10**6, "queries": 32} | changes
    return build_prompt(encode, **arguments)


def identified_profile(num_layers: int = 8, num_heads: int = 8) -> Profile:
    """Layers 0 and 5 dense, layer 3 a window."""
    layers: list[LayerScore | None] = []
    for index in range(num_layers):
        base = 0.6 if index in (0, 5) else 0.05
        heads = tuple(base + 0.3 * head / num_heads for head in range(num_heads))
        score = LayerScore(score=sum(heads) / num_heads, heads=heads)
        layers.append(None if index == 3 else score)
    identified = Identification(
        model="some/[model]",
        alpha=0.05,
        beta=0.3,
        queries=32,
        prompt=Prompt(source="50 word problems", sha256="0" * 64, tokens=6787),
        dtype="bfloat16",
        quantization=None,
        vllm="0.32.0",
        layers=tuple(layers),
    )
    return Profile(
        schema_version=1,
        architecture="LlamaForCausalLM",
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=2,
        head_size=64,
        dense_layers=identified.dense_layers,
        identified=identified,
    )


def test_every_sum_in_the_problems_is_right() -> None:
    text = word_problems(700)
    sums = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text)
    assert len(sums) > 1400
    for left, sign, right, result in sums:
        a, b = int(left), int(right)
        assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)
    for answer in re.findall(r"Answer: (.*)", text):
        steps, _, result = answer.removesuffix(".").rpartition(" The answer is ")
        assert int(result) > 0
        assert re.search(rf"\b{result}\b", steps), answer


def test_problems_are_the_same_everywhere_and_differ() -> None:
    text = word_problems(50)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("6a8270f38f8a00b8")
    assert word_problems(51).startswith(text)
    questions = re.findall(r"Question: (.*)", word_problems(700))
    assert len(set(questions)) == len(questions) == 700


def test_default_prompt() -> None:
    prompt = prompt_of()
    assert prompt.record.source == "50 word problems"
    assert prompt.record.tokens == len(prompt.token_ids) == len(encode(word_problems(50)))
    assert prompt.record.sha256 == hashlib.sha256(word_problems(50).encode()).hexdigest()
    assert prompt_of(longest=100).token_ids == prompt.token_ids[:100]


@pytest.mark.parametrize("length", [32, 500, 20_000])
def test_prompt_of_a_length(length: int) -> None:
    prompt = prompt_of(num_tokens=length)
    assert prompt.record.tokens == len(prompt.token_ids) == length


def test_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("a bb ccc " * 40)
    assert prompt_of(file=path).record.tokens == 120
    assert prompt_of(file=path).record.source == "book.txt"
    assert prompt_of(file=path, num_tokens=50).token_ids == ([1, 2, 3] * 40)[:50]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_tokens": 200, "longest": 100}, ["--prompt-tokens 200", "100", "--max-model-len"]),
        ({"file": "book", "longest": 100}, ["--prompt-file", "120", "--prompt-tokens 100"]),
        ({"file": "book", "num_tokens": 500}, ["--prompt-tokens 500", "120", "lower it"]),
        ({"file": "missing"}, ["--prompt-file", "No such file"]),
        ({"file": "bytes"}, ["--prompt-file", "no UTF-8"]),
        ({"num_tokens": 10}, ["--queries 32", "10 tokens"]),
    ],
)
def test_bad_prompts(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    (tmp_path / "book").write_text("a bb ccc " * 40)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    if "file" in changes:
        changes = {**changes, "file": tmp_path / changes["file"]}
    with pytest.raises(TailorKVError) as caught:
        prompt_of(**changes)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_profile_round_trip(tmp_path: Path) -> None:
    path, profile = tmp_path / "mine.json", identified_profile()
    assert profile.dense_layers == (0, 5)
    write_profile(path, profile)
    assert load_profile(path) == profile
    shape = ModelShape("some/model", "LlamaForCausalLM", 8, 2, 64, 8)
    assert read_profile(path, shape).dense == (0, 5)
    with pytest.raises(TailorKVError, match="num_heads 8, the model has 16"):
        read_profile(path, ModelShape("some/model", "LlamaForCausalLM", 8, 2, 64, 16))


def test_profile_with_scores_of_other_layers(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    content = identified_profile().model_dump(mode="json")
    content["identified"]["layers"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(TailorKVError, match=r"identified\.layers has 7 entries for 8 layers"):
        load_profile(path)


def test_table() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        print_scores(console, identified_profile())
    text = capture.get()
    assert "Dense layers: 0, 5 of 8" in text
    assert text.count("vLLM's, or K and V of another layer") == 1
    assert "Dense preference of [model]" in text
    assert "0.600 to 0.86" in text
    assert [len(bar(share)) for share in (0.0, 0.5, 1.0)] == [0, 15, 30]


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (8, 8), (80, 64)])
def test_picture(tmp_path: Path, layers: int, heads: int) -> None:
    path = tmp_path / "scores.png"
    save_plot(path, identified_profile(layers, heads))
    pixels = imread(path)
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 900
    # The colours of dense and sparse layers are there.
    assert (abs(pixels[..., :3] - (0xD5 / 255, 0x5E / 255, 0)).max(-1) < 0.02).any()
    assert (abs(pixels[..., :3] - (0, 0x72 / 255, 0xB2 / 255)).max(-1) < 0.02).any()


def test_picture_of_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(TailorKVError, match=r"--plot .*scores\.xyz"):
        save_plot(tmp_path / "scores.xyz", identified_profile())


def test_where_the_profile_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert output_path(str(tmp_path), None) == tmp_path / "tailorkv.json"
    assert output_path("owner/Some-Model", None) == Path("some-model.tailorkv.json")
    assert output_path(str(tmp_path), Path("x.json")) == Path("x.json")
    with pytest.raises(TailorKVError, match="no directory"):
        output_path("owner/model", tmp_path / "no" / "x.json")
    with pytest.raises(TailorKVError, match="is a directory"):
        output_path("owner/model", tmp_path)
    older = tmp_path / "tailorkv.json"
    write_profile(older, identified_profile())
    assert output_path(str(tmp_path), None) == older
    other = tmp_path / "config.json"
    other.write_text("{}")
    with pytest.raises(TailorKVError, match="is no profile"):
        output_path("owner/model", other)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--alpha", "0"),
        ("--alpha", "1.5"),
        ("--beta", "-1"),
        ("--queries", "0"),
        ("--prompt-tokens", "many"),
        ("--engine-args", "[1]"),
    ],
)
def test_bad_options(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["model", f"{option}={value}"])
    assert caught.value.code == 2
    assert option in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "--tensor-parallel-size" in text


def test_an_interrupted_write_leaves_the_older_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tailorkv.json"
    older = identified_profile()
    write_profile(path, older)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_profile(path, identified_profile(num_layers=9))
    assert load_profile(path) == older
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_run_leaves_the_older_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tailorkv.json"
    older, newer = identified_profile(), identified_profile(num_layers=9)
    write_profile(path, older)
    found = [KeyboardInterrupt, newer]

    def measure(*_: Any) -> Profile:
        result = found.pop(0)
        if result is KeyboardInterrupt:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(command, "_measure", measure)
    assert main([str(tmp_path)]) == 130
    assert capsys.readouterr().err == "vllm-tailorkv: interrupted\n"
    assert load_profile(path) == older
    assert main([str(tmp_path)]) == 0
    assert load_profile(path) == newer
