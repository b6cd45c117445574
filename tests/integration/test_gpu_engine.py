"""Engines as on a GPU, rehearsed: the real second runner, on a CPU. See `gpu_engine.py`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "gpu_engine.py"
LAYERS = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from random_checkpoint import save_random_checkpoint

    folder = tmp_path_factory.mktemp("gpu") / "model"
    return save_random_checkpoint(folder, "Llama", num_hidden_layers=LAYERS)


def results(checkpoint: Path, mode: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(checkpoint), mode],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, Any]:
    return results(checkpoint, "cpu")


@pytest.fixture(scope="module")
def found(checkpoint: Path) -> dict[str, Any]:
    return results(checkpoint, "gpu")


def test_whole_prompts_and_prefix_hits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    found, expected = found["whole_prompts"], expected["whole_prompts"]
    assert found["plain"] == expected["plain"]
    assert found["hits"] == expected["hits"]
    assert found["cached"] == expected["cached"] > 0
    counted = found["counted"]
    assert counted["quantized_decode_attention"] > 0
    assert counted["retrieve_attention"] == counted["quantized_decode_attention"]
    # All prompts are fresh: their K and V are at hand.
    assert counted["stage_rows"] == 0


def test_chunks_and_preemption(found: dict[str, Any], expected: dict[str, Any]) -> None:
    found, expected = found["chunks_and_preemption"], expected["chunks_and_preemption"]
    assert found["preemptions"] > 0
    assert found["tokens"] == expected["tokens"]


def test_contexts_that_fill_the_buffer(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["small_buffer"]["tokens"] == expected["small_buffer"]["tokens"]


def test_contexts_of_several_buffers(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["pieces"]["tokens"] == expected["pieces"]["tokens"]
    # 430 tokens in chunks of 64, and what lies before each in pieces of 192.
    assert found["pieces"]["counted"]["stage_rows"] > LAYERS * 430 // 64 + 2


def test_replayed_decode_steps(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Rows of padding, growing lengths, other blocks: a graph reads what this step's batch is."""
    found, expected = found["graphs"], expected["graphs"]
    assert found["tokens"] == expected["tokens"]
    assert found["alone"] == expected["alone"]
    # Three requests replay the graph of four, one its own.
    four, _two, one = found["replays"]
    assert four > 0
    assert one > 0
    # Rows were kept on the device, and read there.
    assert min(found["kept"]) > 0
