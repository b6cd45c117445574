"""docs/OPTIONS.md, made of the options themselves: `vllm-tailorkv options --markdown`."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from vllm_tailorkv import envs
from vllm_tailorkv.config import PRESETS, TailorKVConfig

_INTRODUCTION = f"""\
# Options

<!-- Made by `vllm-tailorkv options --markdown > docs/OPTIONS.md`. Edit vllm_tailorkv/config.py and
vllm_tailorkv/envs.py, not this page. -->

Options are a JSON object in vLLM's own argument:

```console
vllm serve MODEL --attention-backend tailorkv \\
    --additional-config '{{"tailorkv": {{"preset": "accurate", "bits": 4}}}}'
```

In Python they are a dict:
`LLM(MODEL, attention_backend="tailorkv", additional_config={{"tailorkv": {{"bits": 4}}}})`.

- The environment variable `{envs.PREFIX}<OPTION>` overrides one option, for instance
  `{envs.PREFIX}BITS=4`. Its value is JSON, or a word.
- An option that is given overrides what its preset says.
- An unknown option or a bad value ends the start with one line that says what is allowed
  ([troubleshooting](TROUBLESHOOTING.md)).
- `vllm-tailorkv options` prints this page as a table in the terminal.
"""

_OF_PRESETS = """\
## Presets

A step of a sparse layer reads `sink_tokens` + `topk_tokens` + `recent_tokens` tokens. Its index
proposes `topk_tokens` x `rerank_factor` candidates first.
"""

_AFTER_PRESETS = """\
`paper` and `paper-long` are the settings that the paper published for LongBench and RULER. What
presets cost and keep: [performance](PERFORMANCE.md), [quality](QUALITY.md).
"""

_CONCLUSION = f"""\
Other variables that begin with `{envs.PREFIX}` end the start, so that a typing error cannot pass
unnoticed. Only those that Kubernetes sets for a service called `vllm-tailorkv` are ignored.
"""


_BOUNDS = {"ge": "from {:,} ", "gt": "above {:,} ", "le": "to {:,} "}
"""What pydantic calls the bounds of a value, and how they are said."""


def _shown(value: Any) -> str:
    """A value as one writes it in JSON; None is no value."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "none" if value is None else f"`{value}`"


def _allowed(field: FieldInfo) -> str:
    """What a value may be."""
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return ", ".join(_shown(value) for value in get_args(annotation))
    if annotation is bool:
        return "`true`, `false`"
    if annotation not in (int, float, float | None):
        return "a path, or an object"
    words = "a whole number " if annotation is int else "a number "
    for kind, said in _BOUNDS.items():
        for bound in field.metadata:
            if hasattr(bound, kind):
                words += said.format(getattr(bound, kind))
    return words.rstrip()


def _table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def options() -> Iterator[tuple[str, ...]]:
    """Each option in Markdown: its name, its default, what it may be, and what it means."""
    for name, field in TailorKVConfig.model_fields.items():
        meaning = str(field.description).replace("|", "\\|")
        yield f"`{name}`", _shown(field.default), _allowed(field), meaning


def _preset(name: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    config = TailorKVConfig(preset=name)  # type: ignore[arg-type]
    sets = ", ".join(f"`{option}` {_shown(value)}" for option, value in values.items())
    return (
        f"`{name}`",
        f"{config.budget_tokens:,}",
        f"{config.candidate_tokens:,}",
        sets or "nothing: the defaults above",
    )


def markdown() -> str:
    """The page."""
    presets = (_preset(name, values) for name, values in PRESETS.items())
    variables = ((f"`{name}`", meaning) for name, meaning in envs.VARIABLES.items())
    lines = [
        *_INTRODUCTION.splitlines(),
        "",
        "## All options",
        "",
        *_table(("option", "default", "values", "meaning"), options()),
        "",
        *_OF_PRESETS.splitlines(),
        "",
        *_table(("preset", "tokens a step", "candidates", "it sets"), presets),
        "",
        *_AFTER_PRESETS.splitlines(),
        "",
        "## Environment variables",
        "",
        *_table(("variable", "meaning"), variables),
        "",
        *_CONCLUSION.splitlines(),
    ]
    return "\n".join(lines) + "\n"
