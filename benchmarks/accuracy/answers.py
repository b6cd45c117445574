"""What may stand where in an answer: the tokens of its references, in any order that is right."""

from collections.abc import Sequence

from tokenizers import Encoding

from accuracy.tasks import Turn


def acceptable(turn: Turn, encoding: Encoding) -> dict[int, frozenset[int]]:
    """Right tokens by their place in the answer, for places that belong to references.

    `encoding` is of `turn.answer`. Where references may come in any order, each that the answer has
    not said yet is as right as the one that it says next, as long as both are spelled alike so far.
    """
    spans = _spans(turn, encoding.offsets)
    if not turn.unordered:
        return {place: frozenset({encoding.ids[place]}) for span in spans for place in span}
    right: dict[int, frozenset[int]] = {}
    spelled = [[encoding.ids[place] for place in span] for span in spans]
    for said, span in enumerate(spans):
        for n, place in enumerate(span):
            alike = (ids for ids in spelled[said:] if ids[:n] == spelled[said][:n])
            right[place] = frozenset(ids[n] for ids in alike if len(ids) > n)
    return right


def _spans(turn: Turn, offsets: Sequence[tuple[int, int]]) -> list[list[int]]:
    """For each reference, the tokens of the answer that share a character with it."""
    spans, searched = [], 0
    for reference in turn.references:
        at = turn.answer.index(reference, searched)
        end = at + len(reference)
        # A list says one reference after the other; others may overlap.
        searched = end if turn.unordered else 0
        spans.append([i for i, (a, b) in enumerate(offsets) if a < end and at < b])
    return spans
