"""`benchmarks/concurrency.py` on a tiny model, with our backend alone."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from concurrency import table
from random_checkpoint import save_random_checkpoint
from rich.console import Console

ROOT = Path(__file__).parents[2]
FOUND = {"output_tokens_per_second", "seconds_per_token", "seconds_to_first_token", "seconds"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/concurrency.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.integration
def test_requests_at_once(tmp_path: Path) -> None:
    model = save_random_checkpoint(tmp_path / "model", "Llama")
    file = tmp_path / "found.jsonl"
    options = ["--model", str(model), "--backends", "tailorkv", "--context", "700"]
    options += ["--output-tokens", "5", "--cache-gib", "1", "--json", str(file)]
    done = run(*options, "--streams", "2,3", "--config", '{"full_attention_below": 0}')
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["streams"] for line in lines] == [2, 3]
    for line in lines:
        assert line["backend"] == "tailorkv"
        assert {"command", "date", "revision", "versions", "processor", "config"} <= line.keys()
        for prompts in ("read", "cached"):
            assert line[prompts].keys() == FOUND
            assert min(line[prompts].values()) > 0
    # Nothing is left to do: no server starts.
    again = run(*options, "--streams", "2,3", "--config", '{"full_attention_below": 0}')
    assert again.returncode == 0, again.stderr
    assert "starting" not in again.stderr


def test_a_table_compares_both() -> None:
    found = {"seconds_per_token": 0.1, "seconds_to_first_token": 2.0, "seconds": 9.0}
    rates = {"tailorkv": 30.0, "vllm": 12.0}
    records = [
        {"backend": name, "streams": 8}
        | {prompts: found | {"output_tokens_per_second": rate} for prompts in ("read", "cached")}
        for name, rate in rates.items()
    ]
    text = io.StringIO()
    Console(width=120, file=text).print(table(records))
    assert "30.0; 100; 2.0" in text.getvalue()
    assert text.getvalue().count("2.50") == 2


def test_a_bad_backend_ends_in_one_line() -> None:
    done = run("--backends", "flash")
    assert done.returncode == 2
    assert "flash is none of tailorkv, vllm" in done.stderr.splitlines()[-1]
