"""Settings and fixtures of the tests that start engines.

They run in a pytest process of their own (the Makefile sees to that): vLLM's CPU worker
binds the threads of the process it lives in.
"""

import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

from pathlib import Path

import pytest
from decoding import Decoded
from engines import LONG_OPTIONS, Expected, LongCase, expected_of, long_case
from features import answers_of, save_random_adapter
from random_checkpoint import save_random_checkpoint


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts engines."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_checkpoint(tmp_path_factory.mktemp("models") / "llama", "Llama")


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_tailorkv.demo.model import load_or_build_demo_model

    return load_or_build_demo_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def expected(random_llama: Path) -> Expected:
    return expected_of(random_llama)


@pytest.fixture(scope="session", params=LONG_OPTIONS)
def case(request: pytest.FixtureRequest, random_llama: Path) -> LongCase:
    return long_case(random_llama, request.param)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(tmp_path_factory.mktemp("adapters") / "random")


@pytest.fixture(scope="session")
def answers(random_llama: Path, adapter: Path) -> dict[str, Decoded]:
    return answers_of(random_llama, adapter)
