"""Divergence from full attention, against what it is by definition."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import text
from accuracy.engine import Decoded
from accuracy.reference import Comparison, Recorder, Reference, divergence
from accuracy.text_quality import CODE, PROSE, held_out, interval, likelihood, references
from tokenizers import Tokenizer

TOKENIZER = Path(__file__).parents[2] / "benchmarks/accuracy/retriever/tokenizer.json"
STEPS, VOCAB = 40, 5000


def logits(seed: int) -> torch.Tensor:
    """[STEPS + 1, VOCAB]: of the prompt's end, then of each step."""
    return 4 * torch.randn(STEPS + 1, VOCAB, generator=torch.Generator().manual_seed(seed))


def recorded(folder: Path, rows: torch.Tensor) -> Reference:
    reference = Reference(folder / "x.f16", STEPS)
    recorder = Recorder(reference)
    for place, row in enumerate(rows):
        assert not reference.complete
        recorder(place, row)
    recorder.finish()
    return reference


def test_divergence_by_hand() -> None:
    full, ours = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    assert divergence(full, ours) == pytest.approx(0.5 * math.log(2), abs=1e-6)
    assert divergence(ours, ours) == 0


def test_kept_rows_give_the_same_divergence(tmp_path: Path) -> None:
    full, ours = logits(1), logits(1) + 0.1 * logits(2)
    comparison = Comparison(recorded(tmp_path, full))
    for place, row in enumerate(ours):
        comparison(place, row)
    p, q = full.double().log_softmax(-1)[1:], ours.double().log_softmax(-1)[1:]
    exact = (p.exp() * (p - q)).sum(-1)
    assert exact.min() > 0.005
    assert np.allclose(comparison.divergences, exact, atol=1e-4)
    assert comparison.agreed == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert 0 < sum(comparison.agreed) < STEPS


def test_full_attention_is_no_distance_from_itself(tmp_path: Path) -> None:
    comparison = Comparison(recorded(tmp_path, logits(1)))
    for place, row in enumerate(logits(1)):
        comparison(place, row)
    assert max(map(abs, comparison.divergences)) < 1e-4
    assert all(comparison.agreed)


def test_a_record_that_is_begun_again_is_not_complete(tmp_path: Path) -> None:
    reference = recorded(tmp_path, logits(1))
    assert reference.complete
    Recorder(reference)
    assert not reference.complete


class Stub:
    """Thinks `rows` at each place."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.asked = rows, []

    def restart(self, question_tokens: int) -> None:
        pass

    def decode(self, context, scripts, *, logprobs, watches):
        self.asked.append((context, scripts))
        for watch in watches:
            for place, row in enumerate(self.rows):
                watch(place, row)
        (script,) = scripts
        return [Decoded(script, [float(-place) for place, _ in enumerate(script)], script)]


def test_a_method_is_compared_with_what_full_attention_thought(tmp_path: Path) -> None:
    texts = [list(range(100)), list(range(100, 200))]
    kept = references(tmp_path, PROSE, texts, STEPS)
    full, ours = Stub(logits(1)), Stub(logits(1) + 0.1 * logits(2))
    found, none = likelihood(full, "full", PROSE, texts, kept, 32, record=True)
    assert none is None
    assert full.asked == [(ids[:59], [ids[59:]]) for ids in texts]
    # What the prompt's end says counts nowhere: of 0, -1, ..., -40 it is the first.
    assert found.values == pytest.approx((-16.5, -36.5))
    same, far = (
        likelihood(stub, "ours", PROSE, texts, kept, 32, record=False)[1] for stub in (full, ours)
    )
    assert abs(same.mean) < 1e-4 and same.agreement == 1
    assert 0.01 < far.low < far.mean < far.high and far.agreement < 1
    assert sum(far.values) > far.mean and far.steps == STEPS


def test_without_a_reference_there_is_no_divergence(tmp_path: Path) -> None:
    kept = references(tmp_path, PROSE, [list(range(100))], STEPS)
    found, none = likelihood(Stub(logits(1)), "a", PROSE, [list(range(100))], kept, 32, False)
    assert found.kind == PROSE and none is None


def test_interval_is_wider_where_neighbours_are_alike() -> None:
    rng = np.random.default_rng(0)
    alone = rng.normal(1.0, 1.0, (2, 1000))
    alike = np.repeat(rng.normal(1.0, 1.0, (2, 20)), 50, axis=1)
    for rows in (alone, alike):
        low, high = interval(rows.tolist())
        assert low < rows.mean() < high
    # 1.96 standard errors each way, of 2,000 values and of 40.
    low, high = interval(alone.tolist())
    assert high - low == pytest.approx(3.92 / 2000**0.5, rel=0.35)
    low, high = interval(alike.tolist())
    assert high - low == pytest.approx(3.92 / 40**0.5, rel=0.4)


def test_code_is_no_prose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = "def double(x):\n    return 2 * x\n" * 20
    (tmp_path / "code.py").write_text(written)
    monkeypatch.setattr(text, "_sources", lambda package: [tmp_path / "code.py"])
    encoder = Tokenizer.from_file(str(TOKENIZER))
    ids = held_out(encoder, 50, 0, CODE)
    assert len(ids) == 50
    assert written.startswith(encoder.decode(ids))
