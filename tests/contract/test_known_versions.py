"""What we use of vLLM is in the sources of every version that we know.

Of the installed version its own sources are read; of the others pip downloads them once, see
`vllm_source.py`. Nothing of them is imported. `make contract` runs these tests alone.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from source_tree import SourceTree
from source_types import Class
from source_uses import Counts, Uses
from vllm_source import HASHES, source_of

from vllm_tailorkv.drafter import Drafter
from vllm_tailorkv.patches import seams
from vllm_tailorkv.patches.catalog import PATCHES
from vllm_tailorkv.patches.record import Patch, patches_for

ROOT = Path(__file__).parents[2]
VERSIONS = tuple(HASHES)
LOOKED_AT = {
    "vllm_tailorkv": Counts(imports=45, members=400, calls=60, overridden=14),
    "benchmarks": Counts(imports=10, members=40, calls=8, overridden=2),
    "tests": Counts(imports=30, members=300, calls=30, overridden=4),
}
"""No fewer than these: else what looks at them has gone blind."""

OWN = {
    "TailorKVBlockManager": set(),
    "TailorKVImpl": {"bind"},
    "TailorKVMetadata": {
        *("num_actual_tokens", "slot_mapping", "groups", "single_tokens", "exact", "decode"),
        *("workspace", "guard"),
    },
    "TailorKVMetadataBuilder": set(),
    "TailorKVSpec": {"layout", "split"},
}
"""What we add to vLLM's classes. All else that ours have is there for vLLM to find."""


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def tree_of(version: str) -> SourceTree:
    """vLLM, and what uses it here."""
    return SourceTree(
        {"vllm": source_of(version) / "vllm"} | {one: ROOT / one for one in LOOKED_AT}
    )


@cache
def uses_of(version: str, user: str) -> Uses:
    return Uses(tree_of(version), user, "vllm")


def test_every_range_of_versions_has_one_that_is_read() -> None:
    ranges = [value for name, value in vars(seams).items() if name.startswith("V0_")]
    assert len(ranges) == len(VERSIONS) > 1
    for one in ranges:
        assert [version for version in VERSIONS if version in SpecifierSet(one)], one


@pytest.mark.parametrize("user", LOOKED_AT)
def test_what_we_use_is_there(version: str, user: str) -> None:
    uses = uses_of(version, user)
    assert sorted(map(str, uses.faults)) == []
    fewest = vars(LOOKED_AT[user])
    found = vars(uses.counts)
    assert {name: found[name] for name in fewest if found[name] < fewest[name]} == {}


def test_what_we_offer_is_looked_for(version: str) -> None:
    """A method by a name that vLLM has given up would lie there unused."""
    added: dict[str, set[str]] = {}
    for name in uses_of(version, "vllm_tailorkv").own:
        owner, _, member = name.partition(".")
        members = added.setdefault(owner, set())
        if not member.startswith("_"):
            members.add(member)
    assert added == OWN


def targets(patch: Patch) -> list[str]:
    """Those of a patch here, and on the other platform if it is one of the platform's."""
    module, _, path = patch.target.partition(":")
    if not module.startswith("vllm.platforms."):
        return [patch.target]
    method = path.rpartition(".")[2]
    owners = ("cpu:CpuPlatform", "cuda:CudaPlatformBase")
    return [f"vllm.platforms.{owner}.{method}" for owner in owners]


RECORDS = [(version, patch) for version in VERSIONS for patch in patches_for(PATCHES, version)]


@pytest.mark.parametrize(
    ("version", "patch"), RECORDS, ids=[f"{patch.name} {version}" for version, patch in RECORDS]
)
def test_patches_fit(version: str, patch: Patch) -> None:
    for target in targets(patch):
        module, _, path = target.partition(":")
        first, *inner = path.split(".")
        found = tree_of(version).find(module, first)
        assert found is not None, target
        if inner and inner[0].startswith("__"):
            continue  # Python's own
        node = found.node
        for name in inner:
            member = Class(found).member(name)
            assert member is not None, target
            node = member[1]
        assert isinstance(node, ast.FunctionDef), target
        wrapped = patch.wrap(lambda *args: args)
        ours = inspect.signature(wrapped).parameters.values()
        assert [one.name for one in ours] == [one.arg for one in node.args.args], target
        assert not node.args.kwonlyargs
        defaults = [one.default for one in ours if one.default is not inspect.Parameter.empty]
        assert defaults == [ast.literal_eval(one) for one in node.args.defaults], target


def test_the_engine_core_calls_what_we_wrap(version: str) -> None:
    """By its global name: a patch of that name is then what is called."""
    module = tree_of(version).module("vllm.v1.engine.core")
    assert module is not None
    called = [
        ast.unparse(node.func) for node in ast.walk(module.parsed) if isinstance(node, ast.Call)
    ]
    assert called.count("get_kv_cache_configs") == 1


def test_vllm_loads_our_plugin(version: str) -> None:
    module = tree_of(version).module("vllm.plugins")
    assert module is not None
    assert "vllm.general_plugins" in strings(module.parsed)


def test_vllm_asks_a_drafter_as_ours_answers(version: str) -> None:
    """By its place, or by a name."""
    runner = tree_of(version).module("vllm.v1.worker.gpu_model_runner")
    assert runner is not None
    branches = [
        node
        for node in ast.walk(runner.parsed)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("== 'custom_class'")
    ]
    calls = [
        node
        for branch in branches
        for statement in branch.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    asked = [node for node in calls if getattr(node.func, "attr", "") == "propose"]
    assert len(asked) == 1
    given = [ast.unparse(one).rpartition(".")[2] for one in asked[0].args]
    assert given == ["sampled_token_ids", "num_tokens_no_spec", "token_ids_cpu"]
    answers = inspect.signature(Drafter.propose)
    answers.bind(None, *given, **{str(one.arg): None for one in asked[0].keywords})


def strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def options_of(version: str) -> set[str]:
    """Options of `vllm serve`, as its sources spell them or by the fields that they are made of."""
    tree = tree_of(version)
    names = ("engine.arg_utils", "entrypoints.common.cli_args", "entrypoints.launchers.cli_args")
    found: set[str] = set()
    for module in filter(None, (tree.module(f"vllm.{name}") for name in names)):
        found |= set(strings(module.parsed))
        for node in ast.walk(module.parsed):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add("--" + node.target.id.replace("_", "-"))
    return found


@pytest.mark.parametrize("folder", ["attention", "demo"])
def test_options_that_we_name_or_give(version: str, folder: str) -> None:
    """A remedy that names an option must name one that there is."""
    named = {
        option
        for path in (ROOT / "vllm_tailorkv" / folder).glob("*.py")
        if path.name != "__main__.py"  # names its own
        for text in strings(ast.parse(path.read_text()))
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", text)
    }
    assert len(named) > 8
    assert named - options_of(version) == set()


def test_arguments_of_engines_that_we_give(version: str) -> None:
    tree = tree_of(version)
    given = tree.find("vllm_tailorkv.identify.engine", "OURS")
    taken = tree.find("vllm.engine.arg_utils", "EngineArgs")
    assert given is not None
    assert taken is not None
    assert isinstance(given.node, ast.AnnAssign)
    assert isinstance(given.node.value, ast.Dict)
    names = [ast.literal_eval(key) for key in given.node.value.keys if key is not None]
    assert len(names) > 5
    assert [name for name in names if Class(taken).member(name) is None] == []
