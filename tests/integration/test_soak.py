"""`benchmarks/soak.py`: one round of load that misbehaves leaves a server as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIVING = ["mixed", "cancellations", "disconnects", "too long", "malformed", "conversations"]
LIVING += ["preemption"]
ENDINGS = ["terminated", "engine killed"]
# What the settings of these tests change for engines in their own process.
CHANGED = {"OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"}


def test_one_round(tmp_path: Path) -> None:
    output = tmp_path / "soak.jsonl"
    environment = {name: value for name, value in os.environ.items() if name not in CHANGED}
    command = [sys.executable, "benchmarks/soak.py", "--minutes", "0", "--output", str(output)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert done.returncode == 0, done.stderr[-3000:]
    assert [one["phase"] for one in records] == ["references", "warm-up", *LIVING, *ENDINGS]
    by_name = {one["phase"]: one for one in records}
    for record in records:
        assert record["problems"] == []
        assert {"revision", "versions", "processor", "backend"} <= record.keys()
    for name in LIVING:
        record = by_name[name]
        assert (record["kv_usage"], record["running"], record["waiting"]) == (0, 0, 0)
        assert record["rss_bytes"] > record["warm_rss_bytes"] / 2
    for name in (*LIVING, *ENDINGS):
        answers = by_name[name]["answers"]
        assert 0 < answers["equal"] <= answers["compared"]
        assert answers["wrong_exact"] == []
    assert by_name["mixed"]["answers"]["tailored"] > 0
    assert by_name["cancellations"]["outcomes"]["left"] == 16
    assert by_name["disconnects"]["outcomes"]["left"] == 16
    assert by_name["too long"]["outcomes"]["refused"] == 3
    assert by_name["malformed"]["outcomes"]["refused"] > 15
    assert by_name["conversations"]["prefix_hits"] > 0
    assert by_name["preemption"]["preemptions"] > 0
    for name in ENDINGS:
        outcomes = by_name[name]["outcomes"]
        assert outcomes.get("failed", 0) + outcomes.get("left", 0) > 0
        assert by_name[name]["exit_status"] is not None
