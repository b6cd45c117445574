"""What a request is made to write: given tokens, and places where the model is free."""

from collections.abc import Sequence

FREE = -1
"""In a script: the model chooses the token."""


class Script:
    """Follows a script as tokens are written, and keeps what the model wrote where it was free.

    A free run ends at its last place, or where the model writes one of `ends`: the script then goes
    on behind the run, and behind that same token if it is given next.
    """

    def __init__(self, tokens: Sequence[int], ends: frozenset[int] = frozenset()) -> None:
        self.tokens = tokens
        self.ends = ends
        self.written: list[list[int]] = []
        self._place = 0

    @property
    def over(self) -> bool:
        """Nothing is left to be written."""
        return self._place >= len(self.tokens)

    @property
    def wanted(self) -> int:
        """The next token, or `FREE`."""
        return FREE if self.over else self.tokens[self._place]

    def advance(self, token: int) -> None:
        """`token` was written."""
        if self.over:
            return
        place, tokens = self._place, self.tokens
        self._place += 1
        if tokens[place] != FREE:
            return
        if place == 0 or tokens[place - 1] != FREE:
            self.written.append([])
        if token not in self.ends:
            self.written[-1].append(token)
            return
        while self.wanted == FREE and not self.over:
            self._place += 1
        if self.wanted == token:
            self._place += 1


def free_runs(
    tokens: Sequence[int], ids: Sequence[int], ends: frozenset[int] = frozenset()
) -> list[list[int]]:
    """What a request with this script wrote where it was free; `ids` is all that it wrote."""
    script = Script(tokens, ends)
    for token in ids:
        script.advance(token)
    return script.written
