"""The seams: every record fits the installed vLLM, all or none are applied, and only once."""

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pydantic
import pytest
import vllm
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_tailorkv import failures, plugin
from vllm_tailorkv.attention.name import CLASS_PATH, NAME
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.patches import layers, seams
from vllm_tailorkv.patches.backend_name import backend_member
from vllm_tailorkv.patches.catalog import PATCHES as RECORDS
from vllm_tailorkv.patches.record import Patch, apply_patches, check_version, patches_for

PATCHES = patches_for(RECORDS, vllm.__version__)
BY_NAME = pytest.mark.parametrize("patch", PATCHES, ids=[patch.name for patch in PATCHES])
MISSING = object()


def run(code: str, **kwargs: Any) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def unpatch_afterwards() -> Iterator[None]:
    hook, before = sys.excepthook, []
    for patch in PATCHES:
        owner, attribute, _ = patch.locate()
        before.append((owner, attribute, vars(owner).get(attribute, MISSING)))
    yield
    sys.excepthook = hook
    for owner, attribute, raw in before:
        if raw is not MISSING:
            setattr(owner, attribute, raw)
        elif attribute in vars(owner):
            delattr(owner, attribute)


@pytest.mark.parametrize("patch", RECORDS, ids=[f"{one.name} {one.vllm}" for one in RECORDS])
def test_record_is_complete(patch: Patch) -> None:
    for field in ("name", "target", "why", "how", "process", "remove_when", "vllm"):
        assert getattr(patch, field).strip(), field
    if patch.upstream is not None:
        assert patch.upstream.startswith("https://")


@BY_NAME
def test_a_proposal_would_remove_it(patch: Patch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "UPSTREAM.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| `{patch.name}` | ["))
    heading = row.partition("[")[2].partition("]")[0]
    assert f"\n## {heading}\n" in text


def test_names_and_targets_are_unique() -> None:
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
    assert len({patch.target for patch in PATCHES}) == len(PATCHES)


def test_the_package_asks_for_what_we_know() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"vllm{seams.ALL}"' in text


@BY_NAME
def test_target_is_there(patch: Patch) -> None:
    owner, attribute, raw = patch.locate()
    assert owner is not None
    assert attribute == patch.target.rpartition(":")[2].rpartition(".")[2]
    assert inspect.isfunction(getattr(raw, "__func__", raw))


@BY_NAME
def test_replacement_takes_what_the_target_takes(patch: Patch) -> None:
    _, attribute, raw = patch.locate()
    original = getattr(raw, "__func__", raw)
    taken = inspect.signature(original).parameters.values()
    given = inspect.signature(patch.wrap(original)).parameters.values()
    if not attribute.startswith("__"):  # Python passes those by position
        assert [p.name for p in taken] == [p.name for p in given]
    assert [(p.kind, p.default) for p in taken] == [(p.kind, p.default) for p in given]


def test_applied_once() -> None:
    apply_patches(PATCHES, vllm.__version__)
    assert all(patch.is_applied() for patch in PATCHES)
    first = [patch.locate()[2] for patch in PATCHES]
    apply_patches(PATCHES, vllm.__version__)
    assert [id(raw) for raw in first] == [id(patch.locate()[2]) for patch in PATCHES]


def test_register_is_idempotent() -> None:
    plugin.register()
    first = [patch.locate()[2] for patch in PATCHES]
    hook = sys.excepthook
    plugin.register()
    assert [id(raw) for raw in first] == [id(patch.locate()[2]) for patch in PATCHES]
    assert sys.excepthook is hook
    assert [name for name in AttentionBackendEnum.__members__ if name == NAME] == [NAME]
    assert AttentionBackendEnum[NAME].get_path() == CLASS_PATH


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1"])
def test_every_known_version_has_every_patch_once(version: str) -> None:
    names = [patch.name for patch in patches_for(RECORDS, version)]
    assert names == list(dict.fromkeys(patch.name for patch in RECORDS))


KNOWN = ["0.32.0", "0.32.0+cpu", "0.32.5", "0.32.0.post1", "0.33.0", "0.33.0+cpu", "0.33.1"]


@pytest.mark.parametrize("version", KNOWN)
def test_known_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize(
    "version",
    [
        *("0.31.9", "0.34.0", "0.33.0.dev1", "1.0.0", "0.4"),
        *("0.32.0rc1", "0.32.1rc2", "0.32.1.dev3+g0123abc"),
        "dev",
    ],
)
def test_unknown_version(version: str) -> None:
    """A source tree without metadata calls itself "dev"; pre-releases may have any code."""
    with pytest.raises(TailorKVError) as caught:
        check_version(version)
    for word in (f"vLLM {version} ", seams.ALL, "vllm==0.32.0", "VLLM_PLUGINS=''"):
        assert word in str(caught.value)


UNKNOWN = """
import logging, vllm
from types import SimpleNamespace
from vllm.platforms import current_platform
vllm.__version__ = "0.40.0"
from vllm_tailorkv import failures, plugin
from vllm_tailorkv.patches.catalog import PATCHES
plugin.register()
assert not any(patch.is_applied() for patch in PATCHES)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
original = current_platform.check_and_update_config
attention = SimpleNamespace(backend=AttentionBackendEnum["TAILORKV"])
original(SimpleNamespace(attention_config=attention))
"""


def test_an_unknown_vllm_is_left_alone_until_our_backend_is_selected() -> None:
    result = run(UNKNOWN)
    assert result.returncode == 1
    text = (result.stdout + result.stderr).decode()
    assert "TailorKV is off: vLLM 0.40.0 is unknown" in text
    last = text.splitlines()[-1]
    assert last.startswith("vllm-tailorkv: error: vLLM 0.40.0 is unknown")


NOWHERE = """
import vllm
from vllm.config import AttentionConfig
vllm.__version__ = "0.40.0"
del AttentionConfig.__dataclass_fields__["backend"]
from vllm_tailorkv import plugin
plugin.register()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
assert "TAILORKV" not in AttentionBackendEnum.__members__
print("well")
"""


def test_an_unknown_vllm_that_selects_backends_otherwise_does_not_learn_our_name() -> None:
    """It would serve by another one in silence."""
    result = run(NOWHERE)
    assert result.stdout.split()[-1:] == [b"well"], result.stderr.decode()


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module to be patched: a function, and a class with a method and a class method."""

    def greet(name: str) -> str:
        return f"hello {name}"

    class Room:
        def size(self) -> int:
            return 2

        @classmethod
        def name(cls) -> str:
            return cls.__name__

    class Kitchen(Room):
        pass

    module = ModuleType("tailorkv_house")
    module.__dict__.update(greet=greet, Room=Room, Kitchen=Kitchen)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def record(target: str, wrap: Callable[..., Any], version: str = seams.ALL) -> Patch:
    return Patch(
        name=f"test-{target}",
        target=f"tailorkv_house:{target}",
        why="why",
        how="how",
        process="all",
        remove_when="never",
        wrap=wrap,
        vllm=version,
    )


def doubled(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: 2 * original(*args)


def test_functions_methods_and_class_methods(house: ModuleType) -> None:
    patches = [record(target, doubled) for target in ("greet", "Kitchen.size", "Kitchen.name")]
    for _ in range(2):
        apply_patches(patches, "0.32.0")
        assert house.greet("you") == "hello youhello you"
        assert house.Kitchen().size() == 4
        assert house.Kitchen.name() == house.Kitchen().name() == "KitchenKitchen"
        # A subclass's patch leaves the parent alone.
        assert (house.Room().size(), house.Room.name()) == (2, "Room")


@pytest.mark.parametrize("target", ["leave", "Garage.size", "Room.colour", "Room.size.unit"])
def test_missing_target_changes_nothing(house: ModuleType, target: str) -> None:
    greet, size = house.greet, house.Room.size
    patches = [record("greet", doubled), record(target, doubled), record("Room.size", doubled)]
    with pytest.raises(TailorKVError) as caught:
        apply_patches(patches, "0.32.0")
    for word in (f"tailorkv_house:{target}", seams.ALL, "VLLM_PLUGINS=''"):
        assert word in str(caught.value)
    assert (house.greet, house.Room.size) == (greet, size)


def test_missing_module() -> None:
    patch = Patch("gone", "vllm.no_such_module:f", "why", "how", "all", "never", doubled)
    with pytest.raises(TailorKVError, match=r"'gone': vLLM has no vllm\.no_such_module:f"):
        apply_patches([patch], "0.32.0")


def test_versions_of_one_patch(house: ModuleType) -> None:
    def thrice(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: 3 * original(*args)

    size = house.Room.size
    patches = [
        record("greet", doubled, seams.V0_32),
        record("greet", thrice, seams.V0_33),
        record("Room.size", doubled, seams.V0_32),
    ]
    with pytest.raises(TailorKVError, match=r"vLLM 1\.0 is unknown"):
        apply_patches(patches, "1.0")
    assert house.greet("you") == "hello you"
    apply_patches(patches, "0.33.0")
    assert house.greet("a") == "hello ahello ahello a"
    assert house.Room.size is size


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_backend_name_survives_pickling(protocol: int) -> None:
    apply_patches(PATCHES, vllm.__version__)
    member = backend_member()
    assert member.name == NAME
    assert pickle.loads(pickle.dumps(member, protocol)) is member
    other = AttentionBackendEnum.CPU_ATTN
    assert pickle.loads(pickle.dumps(other, protocol)) is other
    assert copy.deepcopy([member, other]) == [member, other]


def test_backend_name_survives_spawn() -> None:
    """A new process unpickles before it loads the plugin."""
    apply_patches(PATCHES, vllm.__version__)
    code = f"""
import pickle, sys
member = pickle.loads(sys.stdin.buffer.read())["backend"]
from vllm.v1.attention.backends.registry import AttentionBackendEnum
assert "vllm_tailorkv.plugin" not in sys.modules
assert member is AttentionBackendEnum[{NAME!r}], member
assert member.get_path() == {CLASS_PATH!r}
print("well")
"""
    result = run(code, input=pickle.dumps({"backend": backend_member()}))
    assert result.stdout.split()[-1:] == [b"well"], result.stderr.decode()


def test_layers_of_other_backends_are_left_alone() -> None:
    layer, calls = SimpleNamespace(impl=object(), layer_name="layers.0.attn"), []
    spec = object()
    assert layers.SPEC.wrap(lambda *args: spec)(layer, "config") is spec
    layers.BIND.wrap(lambda *args: calls.append(args))(layer, "cache")
    assert calls == [(layer, "cache")]


def test_caches_of_other_models_are_left_alone() -> None:
    def original(*args: Any) -> Any:
        return args

    config = SimpleNamespace(attention_config=SimpleNamespace(backend=None, backend_per_kind={}))
    for version, more in (("0.32.0", ()), ("0.33.0", ("groups",))):
        patch = next(one for one in patches_for(RECORDS, version) if one.name == "block-count")
        given = (config, [{}, {}], [5, 7], *more)
        assert patch.wrap(original)(*given) == given


HOOK = """
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.failures import report_in_one_line
report_in_one_line()
report_in_one_line()
"""


def test_error_is_reported_in_one_line() -> None:
    code = """
try:
    {}["key"]
except KeyError:
    raise TailorKVError("bits=3: give 1, 2 or 4")
"""
    result = run(HOOK + code)
    assert result.returncode == 1
    assert result.stdout == b""
    assert result.stderr.decode() == "vllm-tailorkv: error: bits=3: give 1, 2 or 4\n"


def test_other_errors_keep_their_traceback() -> None:
    result = run(HOOK + 'raise KeyError("key")')
    assert result.returncode == 1
    lines = result.stderr.decode().splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "KeyError: 'key'"


def test_hook_calls_the_previous_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: seen.append(kind))
    failures.report_in_one_line()
    sys.excepthook(KeyError, KeyError("key"), None)
    sys.excepthook(TailorKVError, TailorKVError("line"), None)
    assert seen == [KeyError]


def test_error_passes_through_pydantic() -> None:
    """vLLM's configuration objects are pydantic dataclasses that call us as they are made."""

    @pydantic.dataclasses.dataclass
    class Inner:
        bits: int

        def __post_init__(self) -> None:
            raise TailorKVError(f"bits={self.bits}: give 1, 2 or 4")

    @pydantic.dataclasses.dataclass
    class Outer:
        inner: Any

        def __post_init__(self) -> None:
            self.inner = Inner(bits=self.inner)

    with pytest.raises(TailorKVError, match=r"^bits=3: give 1, 2 or 4$") as caught:
        Outer(inner=3)
    assert type(caught.value) is TailorKVError
    assert not isinstance(caught.value, ValueError)
