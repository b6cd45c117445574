"""The scripts run on tiny cases and print what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG"

DECODE_KEYS = {
    *("shape", "layer", "index", "bits", "selected", "rerank", "query_reduce", "context"),
    *("batch", "threads"),
    *("implementation", "isa", "ms", "min_ms", "baseline_ms", "baseline_min_ms", "baseline_isa"),
    *("ratio", "fp8_baseline_ms", "fp8_baseline_min_ms", "fp8_ratio", "parts", "page_sets"),
    *("bytes_read", "bandwidth_share", "relative_error", "baseline_error"),
    *("fp8_baseline_error", "rows_checked", "planted_weight", "planted_kept", "rounds"),
}
PROVENANCE_KEYS = {"command", "date", "revision", "versions", "processor"}
WRITE_KEYS = {
    *("shape", "layer", "index", "bits", "context", "chunk", "threads", "implementation", "isa"),
    *("write_ms", "derive_ms", "ms", "us_per_token", "baseline_write_ms", "baseline_isa"),
    *("attention_ms", "attention_rows", "baseline_attention_ms", "speedup", "rounds"),
}


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_commands_name_no_place_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    from provenance import command

    monkeypatch.setattr(sys, "argv", ["benchmarks/a.py", "--json", str(tmp_path / "x.jsonl"), "-"])
    assert command() == "python benchmarks/a.py --json x.jsonl -"


def records(done: subprocess.CompletedProcess[str]) -> list[dict]:
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_decode_attention(tmp_path: Path) -> None:
    picture = tmp_path / "ms.png"
    arguments = "--shape llama-3.2-1b --context 512,1024 --batch 2 --threads 1 --seconds 0.05"
    options = [*arguments.split(), "--json", "-", "--plot", str(picture)]
    lines = records(run("decode_attention.py", *options, VLLM_TAILORKV_CPU_ISA="portable"))
    assert [line["context"] for line in lines] == 9 * [512] + 9 * [1024]
    for line in lines:
        # Where vLLM has no fp8 path the reason stands beside the nulls.
        missing = {"fp8_missing"} if line["fp8_baseline_ms"] is None else set()
        assert set(line) == DECODE_KEYS | missing | PROVENANCE_KEYS
        assert (line["implementation"], line["isa"]) == ("cpu", "portable")
        assert line["rows_checked"] == 2
        assert 0 < line["min_ms"] <= line["ms"]
        assert line["relative_error"] < 1e-2
        assert line["baseline_error"] < 1e-2
        assert missing or 1e-2 < line["fp8_baseline_error"] < 0.5
        assert line["planted_weight"] > 0.8
        assert line["planted_kept"] == (None if line["layer"] == "dense" else 1)
    assert picture.read_bytes()[:4] == PNG


def test_write_pages(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    arguments = "--shape llama-3.2-1b --context 500 --chunk 128 --threads 1 --seconds 0.05"
    done = run("write_pages.py", *arguments.split(), "--attention-rows", "64", "--json", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(line["index"], line["bits"]) for line in lines} == {
        *(("channels", 1), ("onebit", 1), (None, 1), (None, 2), (None, 4))
    }
    for line in lines:
        assert set(line) == WRITE_KEYS | PROVENANCE_KEYS
        assert min(line["write_ms"], line["derive_ms"], line["attention_ms"]) > 0


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["decode_attention.py", "--context", "100"], "--context must be at least 512, is 100"),
        (["decode_attention.py", "--context", "8k"], "'8k' is no list of positive numbers"),
        (["decode_attention.py", "--context", "4000000000"], "lower --context or --batch"),
        (["write_pages.py", "--chunk", "100"], "--chunk must be a multiple of 128, is 100"),
        (["decode_e2e.py", "--config", "[]"], "'[]' is no JSON object"),
        (["decode_e2e.py", "--context", "4000000000"], "lower --context, --batch or --layers"),
    ],
)
def test_refusals(arguments: list[str], remedy: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert remedy in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", ["decode_attention.py", "write_pages.py", "decode_e2e.py"])
def test_help_has_examples(script: str) -> None:
    assert f"examples:\n  python benchmarks/{script}" in printed(run(script, "--help"))


def printed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout
