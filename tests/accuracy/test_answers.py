"""Which tokens are right where in an answer."""

from pathlib import Path

from accuracy.answers import acceptable
from accuracy.tasks import Turn
from tokenizers import Tokenizer

TOKENIZER = Path(__file__).parents[2] / "benchmarks/accuracy/retriever/tokenizer.json"
ENCODER = Tokenizer.from_file(str(TOKENIZER))


def right_words(answer: str, references: tuple[str, ...], unordered: bool) -> list[set[str]]:
    """For each place that belongs to a reference, what may stand there."""
    encoding = ENCODER.encode(answer)
    right = acceptable(Turn("?", answer, references, unordered), encoding)
    for place, tokens in right.items():
        assert encoding.ids[place] in tokens
    return [{ENCODER.decode([token]) for token in right[place]} for place in sorted(right)]


def test_what_is_not_said_yet_is_right_in_any_order() -> None:
    answer, numbers = " 123456, 123789, 555666.\n", ("123456", "123789", "555666")
    assert right_words(answer, numbers, unordered=True) == [
        {" 123", " 555"},
        # The second number begins alike.
        {"456", "789"},
        {" 123", " 555"},
        {"789"},
        {" 555"},
        {"666"},
    ]


def test_a_reference_within_another_is_told_apart() -> None:
    said = right_words(" 123456789, 456.\n", ("123456789", "456"), unordered=True)
    assert said == [{" 123", " 456"}, {"456"}, {"789"}, {" 456"}]


def test_order_is_kept_where_it_matters() -> None:
    assert right_words(" 123, 456.\n", ("123", "456"), unordered=False) == [{" 123"}, {" 456"}]
