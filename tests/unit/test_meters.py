"""What processes count arrives where vLLM serves `/metrics`, and nothing of it stays."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from vllm_tailorkv.attention import meters, metrics
from vllm_tailorkv.attention.meters import Merged, histogram, meter, publish

# A server's processes: two workers, one of which is killed, and the one that serves the metrics.
SCRIPT = """
import multiprocessing, os, signal, sys
from prometheus_client import generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm_tailorkv.attention import meters, metrics
from vllm_tailorkv.attention.meters import histogram, meter, publish

def work(rows, is_killed):
    meter(metrics.DECODE_ROWS, "dense").add(rows)
    meter(metrics.DECODE_ROWS, "dense").add(1)
    meter(metrics.CACHE_BLOCKS, "host").set(10)
    meter(metrics.GUARD_WORST_ERROR, "sparse", "5").set(rows / 100)
    for error in (0.002, 0.3, 7.0):
        histogram(metrics.GUARD_ERROR, "sparse").observe(error)
    if is_killed:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    publish()
    publish()
    meter(metrics.DECODE_ROWS, "sparse").add(2)
    for rows, is_killed in ((20, False), (3, True)):
        process = multiprocessing.get_context("spawn").Process(target=work, args=(rows, is_killed))
        process.start()
        process.join()
    print(generate_latest(get_prometheus_registry()).decode(), flush=True)
    if sys.argv[1:] == ["killed"]:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder for temporary files; this process has counted nothing."""
    for variable in (meters.FOLDER, meters.VLLM_FOLDER):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = list(REGISTRY._collector_to_names)
    for cached in (meters._meter, meters._file):
        cached.cache_clear()
    yield tmp_path
    os.environ.pop(meters.FOLDER, None)
    for cached in (meters._meter, meters._file):
        cached.cache_clear()
    for collector in set(REGISTRY._collector_to_names) - set(before):
        REGISTRY.unregister(collector)


def folders(path: Path) -> list[Path]:
    return sorted(path.glob("tailorkv-metrics-*"))


def run(path: Path, *arguments: str, **environment: str) -> dict[tuple[str, ...], float]:
    """The samples that the script has served, by name and labels."""
    script = path / "script.py"
    script.write_text(SCRIPT)
    temporary_files = path / "temporary"
    temporary_files.mkdir(exist_ok=True)
    variables = {
        name: text for name, text in os.environ.items() if name not in (meters.VLLM_FOLDER,)
    }
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=variables | {"TMPDIR": str(temporary_files)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == (-9 if arguments else 0), done.stderr[-2000:]
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(done.stdout)
        for sample in family.samples
        if family.name.startswith("tailorkv")
    }


def check(samples: dict[tuple[str, ...], float]) -> None:
    assert samples["tailorkv_decode_rows_total", "dense"] == 25
    assert samples["tailorkv_decode_rows_total", "sparse"] == 2
    assert samples["tailorkv_cache_blocks", "host"] == 20
    assert samples["tailorkv_guard_worst_error", "5", "sparse"] == 0.2
    assert samples["tailorkv_guard_error_count", "sparse"] == 6
    assert samples["tailorkv_guard_error_bucket", "sparse", "0.003"] == 2
    assert samples["tailorkv_guard_error_bucket", "sparse", "0.5"] == 4
    assert samples["tailorkv_guard_error_bucket", "sparse", "+Inf"] == 6
    assert samples["tailorkv_guard_error_sum", "sparse"] == pytest.approx(2 * 7.302)


def test_one_api_server(tmp_path: Path) -> None:
    # What another program of the same shell has left in the environment is not ours.
    check(run(tmp_path, **{meters.FOLDER: f"1:{tmp_path}"}))
    assert not folders(tmp_path / "temporary")
    assert not list(tmp_path.glob("*.db"))


@pytest.mark.slow
def test_several_api_servers(tmp_path: Path) -> None:
    """They share a folder that vLLM has made."""
    shared = tmp_path / "shared"
    shared.mkdir()
    check(run(tmp_path, **{meters.VLLM_FOLDER: str(shared)}))
    assert len(list(shared.glob("counter_tailorkv-*.db"))) == 3
    assert not list(shared.glob("*.new"))
    assert not folders(tmp_path / "temporary")


@pytest.mark.slow
def test_the_next_one_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    run(tmp_path, "killed")
    assert len(folders(tmp_path / "temporary")) == 1
    run(tmp_path)
    assert not folders(tmp_path / "temporary")


def test_those_that_live_are_left_alone(temporary: Path) -> None:
    publish()
    os.environ.pop(meters.FOLDER)
    publish()
    assert len(folders(temporary)) == 2


def test_values_of_one_process(temporary: Path) -> None:
    publish()
    assert len(folders(temporary)) == 1
    for _ in range(2):
        meter(metrics.HOST_READ, "dense", "derive").add(2.5)
    histogram(metrics.GUARD_ERROR, "dense").observe(float("inf"))
    labels = {"layers": "dense", "by": "derive"}
    assert REGISTRY.get_sample_value("tailorkv_host_read_bytes_total", labels) == 5
    labels = {"layers": "dense", "le": "+Inf"}
    assert REGISTRY.get_sample_value("tailorkv_guard_error_bucket", labels) == 1


@pytest.mark.parametrize("place", ["missing", "file"])
def test_no_place_for_files(temporary: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Serving goes on, and says so once."""
    said: list[object] = []
    monkeypatch.setattr(meters, "_warn", said.append)
    (temporary / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / place))
    publish()
    meter(metrics.DECODE_ROWS, "dense").add(1)
    assert len(said) == 1
    assert meters.FOLDER not in os.environ


def test_a_folder_that_is_gone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setattr(meters, "_warn", said.append)
    publish()
    (folder,) = folders(temporary)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    meter(metrics.DECODE_ROWS, "dense").add(1)
    assert len(said) == 1
    assert list(Merged(folder).collect()) == []


@pytest.mark.parametrize("content", [b"", b"\x40\0\0\0\0\0\0\0nonsense" * 8])
def test_files_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "counter_tailorkv-1.db").write_bytes(content)
    assert list(Merged(tmp_path).collect()) == []


def test_all_values_of_a_large_model_fit_their_file(temporary: Path) -> None:
    """The file does not grow: what it may take of the disk is taken at the start."""
    publish()
    for layer in range(200):
        meter(metrics.GUARD_WORST_ERROR, "sparse", str(layer)).set(1)
    (path,) = folders(temporary)[0].glob("*.db")
    assert path.stat().st_size == meters._FILE_BYTES


def test_names() -> None:
    """vLLM unregisters what has its name, and Prometheus wants counters without the suffix."""
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names)
    for metric in metrics.METRICS:
        assert metric.name.startswith("tailorkv_")
        assert not metric.name.endswith("_total")
        assert metric.text.endswith(".")
        assert (metric.kind == "histogram") == bool(metric.buckets)


def test_the_page_lists_them() -> None:
    page = (Path(__file__).parents[2] / "docs/METRICS.md").read_text()
    for metric in metrics.METRICS:
        assert f"`{metric.shown}" in page, metric.shown
