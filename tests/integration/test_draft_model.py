"""Speculation by a model or an EAGLE head: vLLM's own backend serves the draft, ours the model."""

from pathlib import Path

import pytest
import speculation
from eagle_head import save_eagle_head
from engines import engine, greedy

from vllm_tailorkv.errors import TailorKVError


@pytest.fixture(scope="module")
def draft(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layer of the random Llama."""
    import transformers

    path = tmp_path_factory.mktemp("models") / "draft"
    load = transformers.LlamaForCausalLM.from_pretrained
    load(random_llama, num_hidden_layers=1).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(random_llama).save_pretrained(path)
    return path


def test_a_draft_model(random_llama: Path, draft: Path) -> None:
    """Some drafts are right and most are not; rows with drafts, all of them here, are exact."""
    case = speculation.CASES["sometimes"]
    with engine(random_llama) as llm:
        expected = greedy(llm, case.prompts, speculation.STEPS)
    result = speculation.run(random_llama, "sometimes", draft)
    assert result.tokens == expected
    assert 0 < result.accepted < result.drafted
    assert result.tailored == 0


def test_an_eagle_head(random_llama: Path, tmp_path: Path) -> None:
    """It reads the model's hidden states, and keeps K and V in a layer of its own."""
    case = speculation.CASES["sometimes"]
    with engine(random_llama) as llm:
        expected = greedy(llm, case.prompts, speculation.STEPS)
    head = save_eagle_head(random_llama, tmp_path / "head")
    result = speculation.run(random_llama, "sometimes", head, "eagle")
    assert result.tokens == expected
    assert result.accepted < result.drafted
    assert result.tailored == 0


def test_our_backend_for_the_draft_is_refused(random_llama: Path, draft: Path) -> None:
    config = {
        "method": "draft_model",
        "model": str(draft),
        "num_speculative_tokens": 3,
        "attention_backend": "tailorkv",
    }
    refused = pytest.raises(TailorKVError, match="speculative config")
    with refused, engine(random_llama, {}, speculative_config=config):
        pass
