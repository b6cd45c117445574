"""`benchmarks/decode_e2e.py` on a model of three layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ["ttft_seconds", "seconds_per_token", "min_seconds_per_token", "peak_rss_bytes"]
RESULTS += ["kv_cache_bytes"]
KEYS = {
    *("shape", "layers", "context", "batch", "threads", "warm", "config", "isa", "decode_steps"),
    *RESULTS,
    *(f"baseline_{name}" for name in RESULTS),
    *("ttft_ratio", "ratio"),
    *("command", "date", "revision", "versions", "processor"),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/decode_e2e.py", "--layers", "3", "--threads", "1"]
    return subprocess.run(
        [*command, "--output-tokens", "3", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("warm", [False, True])
def test_decode_e2e(warm: bool, tmp_path: Path) -> None:
    picture = tmp_path / "e2e.png"
    # Two chunks and a bit, so that a request decodes while another one is read.
    options = ["--context", "1500", "--batch", "2", "--config", '{"bits": 1}']
    done = run(*options, "--plot", str(picture), *(["--warm"] if warm else []))
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    assert set(line) == KEYS
    assert line["config"] == {"bits": 1}
    assert line["decode_steps"] == 3
    assert 0 < line["min_seconds_per_token"] <= line["seconds_per_token"]
    assert (line["ttft_seconds"] is None) == warm
    # K and V of 12 heads in 3 layers and two bytes, both requests; ours has derived pages too.
    assert line["baseline_kv_cache_bytes"] >= 2 * 1500 * 3 * 2 * 12 * 64 * 2
    assert line["kv_cache_bytes"] > line["baseline_kv_cache_bytes"]
    assert line["peak_rss_bytes"] > line["kv_cache_bytes"]
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_bad_option_ends_in_one_line() -> None:
    done = run("--context", "600", "--config", '{"bitz": 1}')
    assert done.returncode == 2
    assert "bitz" in done.stderr.splitlines()[-1]
