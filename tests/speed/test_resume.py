"""`decode_e2e.py` is interrupted and goes on: nothing is measured twice, nothing is lost."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decode_e2e
import pytest

CONTEXTS = [512, 1024, 2048]


def measured(job: Any) -> dict[str, Any]:
    """What the fake engine takes: the same for the same job."""
    ours = job.options is not None
    seconds = job.context * (1e-6 if ours else 3e-6)
    return {
        "first": 100 * seconds,
        "steps": [seconds * (1 + i) for i in range(job.output_tokens)],
        "peak_rss_bytes": job.context,
        "kv_cache_bytes": job.context,
        "isa": "portable" if ours else None,
    }


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """What the fake engine ran: contexts, and whether with tailorkv."""
    done: list[tuple[int, bool]] = []
    interrupt_after(monkeypatch, done, None)
    return done


def interrupt_after(
    monkeypatch: pytest.MonkeyPatch, done: list[tuple[int, bool]], count: int | None
) -> None:
    def run_engine(job: Any, threads: int, on_tokens: Callable[[int], None]) -> dict[str, Any]:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append((job.context, job.options is not None))
        return measured(job)

    monkeypatch.setattr(decode_e2e, "run_engine", run_engine)


def run(monkeypatch: pytest.MonkeyPatch, file: Path | str, *more: str) -> None:
    asked = ["--context", ",".join(map(str, CONTEXTS)), "--threads", "1", "--output-tokens", "3"]
    command = ["decode_e2e.py", *asked, "--layers", "2", "--json", str(file), *more]
    monkeypatch.setattr(sys, "argv", command)
    decode_e2e.main()


def lines(file: Path) -> list[dict[str, Any]]:
    """Without what names the time and the command."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in ("date", "command")} for x in found]


@pytest.mark.parametrize("count", range(2 * len(CONTEXTS)))
def test_it_goes_on(
    count: int, ran: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole, file = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(monkeypatch, whole)
    ran.clear()
    interrupt_after(monkeypatch, ran, count)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, file)
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("the same command goes on")
    assert lines(file) == lines(whole)[: count // 2]
    ran.clear()
    interrupt_after(monkeypatch, ran, None)
    run(monkeypatch, file)
    assert [context for context, _ in ran[::2]] == CONTEXTS[count // 2 :]
    assert lines(file) == lines(whole)
    # A whole file is left as it is.
    ran.clear()
    run(monkeypatch, file)
    assert ran == [] and lines(file) == lines(whole)


@pytest.mark.parametrize("damage", ["half", "zeros", "no newline"])
def test_a_cut_last_line_is_done_again(
    damage: str, ran: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.jsonl"
    run(monkeypatch, file)
    whole, text = lines(file), file.read_text()
    last = text.splitlines(keepends=True)[-1]
    damaged = {"half": last[: len(last) // 2], "zeros": "\0" * 9, "no newline": last.rstrip()}
    file.write_text(text.removesuffix(last) + damaged[damage])
    ran.clear()
    run(monkeypatch, file)
    # All of a line but its end is a whole result.
    assert [context for context, _ in ran] == ([] if damage == "no newline" else 2 * CONTEXTS[-1:])
    assert lines(file) == whole


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--batch", "2"], "batch 1, not 2"),
        (["--layers", "3"], "layers 2, not 3"),
        (["--warm"], "warm false, not true"),
        (["--config", '{"bits": 1}'], 'config {}, not {"bits": 1}'),
        (["--output-tokens", "4"], "decode_steps 3, not 4"),
    ],
)
def test_other_settings_are_refused(
    options: list[str],
    told: str,
    ran: list,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    file = tmp_path / "out.jsonl"
    run(monkeypatch, file)
    before = file.read_text()
    ran.clear()
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, file, *options)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"was made with {told}; name another file with --json, or remove it" in line
    assert ran == [] and file.read_text() == before


@pytest.mark.parametrize("text", ["a note of mine", '{\n "a": 1\n}\n', "[1]\n", '{"a": 1}\n'])
def test_other_files_are_refused(
    text: str, ran: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text(text)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, file)
    assert caught.value.code == 2
    assert ran == [] and file.read_text() == text


def test_another_processor_is_refused_and_another_revision_is_not(
    ran: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "out.jsonl"
    run(monkeypatch, file)
    ran.clear()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(x | {"revision": "older"}) + "\n" for x in records))
    run(monkeypatch, file)
    assert ran == []
    file.write_text("".join(json.dumps(x | {"processor": "another"}) + "\n" for x in records))
    with pytest.raises(SystemExit):
        run(monkeypatch, file)
    assert 'processor "another"' in capsys.readouterr().err


def test_more_contexts_are_added(
    ran: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.jsonl"
    run(monkeypatch, file)
    ran.clear()
    # One that is asked for twice is measured twice.
    run(monkeypatch, file, "--context", "4096,512,512", "--plot", str(tmp_path / "plot.png"))
    assert [context for context, _ in ran[::2]] == [4096, 512]
    assert [x["context"] for x in lines(file)] == [*CONTEXTS, 4096, 512]
    assert (tmp_path / "plot.png").exists()


def test_stdout_is_not_gone_on_with(
    ran: list, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupt_after(monkeypatch, ran, 2)
    with pytest.raises(SystemExit):
        run(monkeypatch, "-")
    told = capfd.readouterr()
    assert [json.loads(line)["context"] for line in told.out.splitlines()] == CONTEXTS[:1]
    assert told.err.splitlines()[-1].endswith("with --json FILE it could go on")
