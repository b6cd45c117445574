"""How often functions are called: what shows that an engine was served by what it was to be."""

from typing import Any


class Counted(dict[str, int]):
    """Calls by name."""

    def watch(self, owner: Any, name: str) -> None:
        """Count the calls of `owner.name` from now on."""
        original = getattr(owner, name)
        self[name] = 0

        def counting(*arguments: Any, **named: Any) -> Any:
            self[name] += 1
            return original(*arguments, **named)

        setattr(owner, name, counting)

    def since(self, before: dict[str, int]) -> dict[str, int]:
        """The calls since there were so many."""
        return {name: count - before[name] for name, count in self.items()}
