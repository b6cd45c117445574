"""`benchmarks/lossless.py` on a tiny model."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from lossless import record, table
from random_checkpoint import save_random_checkpoint
from rich.console import Console

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/lossless.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_drafts_of_a_tiny_model(tmp_path: Path) -> None:
    model = save_random_checkpoint(tmp_path / "model", "Llama")
    file = tmp_path / "found.jsonl"
    options = ["--model", str(model), "--ways", "drafts", "--context", "300", "--batch", "2"]
    options += ["--output-tokens", "9", "--drafts", "3", "--json", str(file)]
    done = run(*options, "--config", '{"full_attention_below": 0, "preset": "fast"}')
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (json.loads(line) for line in file.read_text().splitlines())
    assert [len(answer) for answer in line["tokens"]] == [9, 9]
    assert line["tokens_per_second"] > 0
    assert 0 <= line["accepted_share"] <= 1
    assert 1 <= line["tokens_per_judging"] <= 4
    # Nothing is left to do: no engine starts.
    again = run(*options, "--config", '{"full_attention_below": 0, "preset": "fast"}')
    assert again.returncode == 0, again.stderr
    assert "lossless.py: drafts" not in again.stderr


def test_what_is_the_same_is_counted() -> None:
    full = [[1, 2, 3, 4], [5, 6, 7, 8]]
    found = {"tokens": [[1, 2, 9, 4], [5, 6, 7, 8]], "seconds": 2.0, "drafted": 8, "accepted": 6}
    one = record(found, 4, full)
    assert one["tokens_per_second"] == 3  # three of each answer are timed
    assert one["accepted_share"] == 0.75
    assert one["tokens_per_judging"] == 4
    assert (one["same_tokens"], one["same_share"]) == (3, 0.5)
    base = record(found | {"tokens": full, "drafted": 0, "seconds": 4.0}, 0, None)
    assert (base["accepted_share"], base["same_share"]) == (None, 1)
    text = io.StringIO()
    records = [base | {"way": "vllm", "drafts": 0}, one | {"way": "drafts", "drafts": 4}]
    Console(width=120, file=text).print(table(records))
    drawn = text.getvalue().splitlines()
    assert any("drafts, 4 at once" in row and "2.00" in row and "75%" in row for row in drawn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--ways", "magic"], "magic is none of"), (["--output-tokens", "1"], "give 2 or more")],
)
def test_bad_arguments_end_in_one_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
