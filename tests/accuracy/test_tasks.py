"""Tasks: solvable, of the length asked for, and the same for the same seed."""

import json
import random
import re
from collections import Counter
from itertools import islice
from uuid import UUID

import pytest
from accuracy import text
from accuracy.tasks import TASKS, Source


def count(piece: str) -> int:
    return len(piece) // 4 + 1


def source(seed: int, chat: bool = False) -> Source:
    rng = random.Random(seed)
    return Source(rng, text.lines(text.EVALUATION_PACKAGES, rng), count, chat)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("num_tokens", [700, 4000])
def test_right_answers_score_and_others_do_not(name, num_tokens, chat):
    example = TASKS[name].make(source(1, chat), num_tokens, 2)
    assert example.turns
    for turn in example.turns:
        assert turn.score(turn.answer) == 1
        assert turn.score("no such thing") == 0


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_every_reference_stands_in_the_context(name, chat):
    example = TASKS[name].make(source(2, chat), 3000, 2)
    for turn in example.turns:
        for reference in turn.references:
            assert reference in example.context


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"common_words", "frequent_words"}))
def test_context_has_the_length_asked_for(name):
    example = TASKS[name].make(source(3), 5000, 2)
    questions = sum(count(t.question + t.begun + t.answer) for t in example.turns)
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


def test_numbers_and_names_of_a_chat_are_rulers():
    asked = source(9, chat=True)
    assert all(re.fullmatch(r"[1-9]\d{6}", asked.number()) for _ in range(50))
    assert all(re.fullmatch(r"[a-z]+-[a-z]+", key) for key in islice(asked.keys(), 50))
    assert UUID(asked.long_code()).version == 4


def test_uuids_among_uuids():
    example = TASKS["multikey_3"].make(source(10, chat=True), 6000, 3)
    lines = example.context.splitlines()
    uuid = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    assert len(lines) > 50
    assert all(len(re.findall(uuid, line)) == 2 for line in lines)


def test_a_chain_of_variables_is_told_in_order():
    example = TASKS["variable_tracking"].make(source(11, chat=True), 3000, 3)
    (turn,) = example.turns
    told = re.findall(r"^LET (\w+) = (\w+)$", example.context, re.MULTILINE)
    assert [name for name, _ in told] == list(turn.references)
    assert [value for _, value in told[1:]] == list(turn.references[:-1])
    assert told[0][1] in turn.question


@pytest.mark.parametrize("num_tokens", [1500, 4000, 20_000])
def test_coded_words_asked_are_the_most_frequent(num_tokens):
    example = TASKS["frequent_words"].make(source(12, chat=True), num_tokens, 1)
    counts = Counter(example.context.split()).most_common(5)
    assert set(counts[0][0]) == {"."}
    assert tuple(word for word, _ in counts[1:4]) == example.turns[0].references
    assert counts[3][1] > counts[4][1]


@pytest.mark.parametrize(("num_tokens", "repeats"), [(900, 10), (8000, 30), (60_000, 30)])
def test_common_words_of_a_chat_stand_ten_times_as_often(num_tokens, repeats):
    example = TASKS["common_words"].make(source(13, chat=True), num_tokens, 1)
    counts = Counter(example.context.split()[1::2])
    common = example.turns[0].references
    assert {counts.pop(word) for word in common} == {max(repeats, 10 * max(counts.values()))}
    assert len(counts) > 10


def test_late_recall_has_a_long_text_in_between():
    for chat in (False, True):
        example = TASKS["late_recall"].make(source(14, chat), 8000, 3)
        (turn,) = example.turns
        assert 700 <= len(turn.begun.split()) <= 740
        assert turn.answer not in turn.begun and turn.answer in example.context


def test_fields_count_in_their_place_only():
    example = TASKS["table_to_json"].make(source(15, chat=True), 4000, 1)
    (turn,) = example.turns
    assert turn.begun + turn.answer == json.dumps(json.loads(turn.begun + turn.answer)).replace(
        "}, {", "},\n{"
    )
    first, second = json.loads(turn.begun + turn.answer)
    assert turn.references == (*first.values(), *second.values())
    written = json.dumps([first, second | {"desk": first["desk"]}], indent=2)
    assert turn.score(written) == 0.9
    swapped = first | {"badge": first["phone"], "phone": first["badge"]}
    assert turn.score(json.dumps([swapped, second])) == 0.8
    # The second object is cut off within its third field.
    assert turn.score(turn.answer[: turn.answer.index(second["badge"]) + 2]) == 0.7
    assert turn.score(json.dumps([second, first])) == 0
