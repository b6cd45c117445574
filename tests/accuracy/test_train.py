"""Training by its command line: interrupted and resumed, it gives the same weights."""

import sys
from pathlib import Path

import pytest
from accuracy import train
from safetensors.torch import load_file

OPTIONS = "--hidden 128 --layers 2 --steps 6 --save-every 2 --tokens 256 --lr 0.02"


def trained(out: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(out), *options.split()])
    train.main()
    return {name: tensor.tolist() for name, tensor in load_file(out / "model.safetensors").items()}


@pytest.mark.usefixtures("small_text")
@pytest.mark.slow
def test_resumed_training_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole", OPTIONS, monkeypatch)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_weights", interrupted)
        trained(tmp_path / "resumed", OPTIONS, patch)
    assert not (tmp_path / "resumed/model.safetensors").exists()
    assert trained(tmp_path / "resumed", OPTIONS, monkeypatch) == whole
    assert trained(tmp_path / "other", f"{OPTIONS} --seed 1", monkeypatch) != whole
