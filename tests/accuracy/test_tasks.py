"""Tasks: solvable, of the length asked for, and the same for the same seed."""

import random

import pytest
from accuracy import text
from accuracy.tasks import TASKS, Source


def count(piece: str) -> int:
    return len(piece) // 4 + 1


def source(seed: int) -> Source:
    rng = random.Random(seed)
    return Source(rng, text.lines(text.EVALUATION_PACKAGES, rng), count)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("num_tokens", [600, 4000])
def test_right_answers_score_and_others_do_not(name, num_tokens):
    example = TASKS[name].make(source(1), num_tokens, 2)
    assert example.turns
    for turn in example.turns:
        assert turn.score(turn.question + turn.answer) == 1
        assert turn.score("no such thing") == 0


@pytest.mark.parametrize("name", TASKS)
def test_every_reference_stands_in_the_context(name):
    example = TASKS[name].make(source(2), 3000, 2)
    for turn in example.turns:
        for reference in turn.references:
            assert reference in example.context


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"common_words", "frequent_words"}))
def test_context_has_the_length_asked_for(name):
    example = TASKS[name].make(source(3), 5000, 2)
    questions = sum(count(turn.question + turn.answer) for turn in example.turns)
    assert 4000 <= sum(map(count, example.context.splitlines(keepends=True))) + questions <= 5100


@pytest.mark.parametrize("name", ["common_words", "frequent_words"])
@pytest.mark.parametrize("seed", range(8))
def test_lists_of_words_are_about_as_long_as_asked_for(name, seed):
    """Few different words make the frequent text, so its length varies with theirs."""
    words = source(seed)
    counted = Source(words.rng, words.lines, lambda piece: len(piece.encode()) - piece.count("e"))
    example = TASKS[name].make(counted, 20_000, 1)
    length = sum(map(counted.count_tokens, example.context.splitlines(keepends=True)))
    assert 10_000 <= length <= 21_000


@pytest.mark.parametrize("name", TASKS)
def test_same_seed_same_example(name):
    assert TASKS[name].make(source(4), 1000, 1) == TASKS[name].make(source(4), 1000, 1)
    assert TASKS[name].make(source(4), 1000, 1) != TASKS[name].make(source(5), 1000, 1)


def test_every_fact_has_one_answer():
    """A key, or a number to trace, is never said twice with different values."""
    example = TASKS["multikey_2"].make(source(6), 8000, 4)
    keys = [line.split(" is ")[0] for line in example.context.splitlines()]
    assert len(keys) == len(set(keys)) > 100


def test_common_words_are_the_most_common():
    example = TASKS["common_words"].make(source(7), 4000, 1)
    listed = example.context.replace("\n", ", ").split(", ")
    (turn,) = example.turns
    rest = set(filter(None, listed)) - set(turn.references)
    fewest = min(listed.count(word) for word in turn.references)
    assert fewest >= 5 * max(listed.count(word) for word in rest)


def test_too_many_facts_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        TASKS["multivalue"].make(source(8), 400, 8)


def test_training_and_evaluation_text_differ():
    assert not set(text.TRAINING_PACKAGES) & set(text.EVALUATION_PACKAGES)
