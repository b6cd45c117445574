"""Scripts: what a request is made to write, and where the model's answers lie in it."""

from accuracy.scripts import FREE, Script, free_runs

END = 9


def follow(tokens: list[int], ends: frozenset[int], model: list[int]) -> list[int]:
    """What is written when the model writes `model` where it is free."""
    script, written, chosen = Script(tokens, ends), [], iter(model)
    while not script.over:
        token = next(chosen) if script.wanted == FREE else script.wanted
        written.append(token)
        script.advance(token)
    return written


def test_given_tokens_are_written_and_free_ones_chosen() -> None:
    assert follow([1, 2, FREE, FREE, 3], frozenset(), [7, END]) == [1, 2, 7, END, 3]
    assert free_runs([1, 2, FREE, FREE, 3], [1, 2, 7, END, 3]) == [[7, END]]


def test_an_answer_that_ends_is_cut_there() -> None:
    tokens, ends = [1, FREE, FREE, FREE, 2, FREE, FREE], frozenset({END})
    written = follow(tokens, ends, [7, END, 8, 8])
    assert written == [1, 7, END, 2, 8, 8]
    assert free_runs(tokens, written, ends) == [[7], [8, 8]]


def test_an_end_that_the_template_writes_is_not_written_twice() -> None:
    tokens, ends = [1, FREE, FREE, END, 2, FREE], frozenset({END})
    ended = follow(tokens, ends, [END, 8])
    assert ended == [1, END, 2, 8]
    assert free_runs(tokens, ended, ends) == [[], [8]]
    # An answer that has no end is ended by the script.
    assert follow(tokens, ends, [7, 7, 8]) == [1, 7, 7, END, 2, 8]


def test_given_ends_end_nothing() -> None:
    tokens = [END, 1, END, 2]
    assert follow(tokens, frozenset({END}), []) == tokens


def test_what_comes_after_the_script_is_no_answer() -> None:
    tokens, ends = [1, FREE, FREE], frozenset({END})
    assert free_runs(tokens, [1, END, 5], ends) == [[]]
