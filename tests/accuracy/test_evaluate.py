"""How answers become scores, with an engine whose every word is known."""

from pathlib import Path

import pytest
from accuracy.engine import Decoded
from accuracy.evaluate import ANSWERS, GIVEN, WRITTEN, make_cell, run_cell
from accuracy.methods import parse_method
from accuracy.prompts import form_of
from accuracy.scripts import FREE, Script
from accuracy.tasks import TASKS
from chat import chat_tokenizer
from tokenizers import Tokenizer

TOKENIZER = Path(__file__).parents[2] / "benchmarks/accuracy/retriever/tokenizer.json"
ENCODER = Tokenizer.from_file(str(TOKENIZER))
FULL = parse_method("full", 5)


class Stub:
    """Writes `answers` in turn where it is free; would write tokens in `known`, else token 0."""

    def __init__(self, answers=(), known=(), one_at_a_time=False):
        self.answers, self.known = list(answers), set(known)
        self.one_at_a_time, self.restarts, self.batches = one_at_a_time, [], []

    def restart(self, question_tokens):
        self.restarts.append(question_tokens)

    def decode(self, context, scripts, *, logprobs=False, ends=frozenset()):
        self.batches.append(len(scripts))
        return [self._follow(script) for script in scripts]

    def _follow(self, script):
        ids, written = [], []
        for place, token in enumerate(script):
            if token == FREE and (place == 0 or script[place - 1] != FREE):
                written = ENCODER.encode(self.answers.pop(0)).ids
            ids.append((written.pop(0) if written else 0) if token == FREE else token)
        likeliest = [token if token in self.known else 0 for token in ids]
        return Decoded(ids, [0.0] * len(ids), likeliest)


def cell_of(task, answers, turns=3):
    return make_cell(ENCODER, task, 1024, 1, turns, 0, answers)


@pytest.mark.parametrize("task", ["single_2", "multiquery", "multi_turn"])
def test_written_answers_are_read(task):
    cell = cell_of(task, WRITTEN)
    right = [turn.answer for turn in cell.contexts[0].example.turns]
    wrong = [right[0], " nothing.\n", right[2]]
    assert run_cell(Stub(right), FULL, cell, ENCODER.decode).values == (1, 1, 1)
    assert run_cell(Stub(wrong), FULL, cell, ENCODER.decode).values == (1, 0, 1)


@pytest.mark.parametrize("task", TASKS)
def test_given_answers_count_tokens_of_references(task):
    (tokens,) = cell_of(task, GIVEN, 1).contexts
    script = [token for script in tokens.scripts for token in script]
    assert FREE not in script
    (turn,), (asked,) = tokens.example.turns, tokens.asked
    said = ENCODER.decode([script[i] for i in asked])
    assert all(reference in said.replace("\n", "") for reference in turn.references)
    assert min(asked) >= tokens.question_tokens[0]
    half = {script[i] for i in list(asked)[: len(asked) // 2]}
    expected = sum(script[i] in half for i in asked) / len(asked)
    cell = cell_of(task, GIVEN, 1)
    assert run_cell(Stub(known=half), FULL, cell, ENCODER.decode).values == (expected,)
    assert run_cell(Stub(known=script), FULL, cell, ENCODER.decode).values == (1,)


def test_what_a_list_has_still_to_say_is_right():
    """Four numbers of two tokens each: the last one's first token is right at the start of all."""
    cell = cell_of("multivalue", GIVEN, 1)
    (tokens,) = cell.contexts
    last = tokens.scripts[0][list(*tokens.asked)[-2]]
    stub = Stub()
    stub.decode = lambda context, scripts, logprobs, ends: [
        Decoded(script, [0.0] * len(script), [last] * len(script)) for script in scripts
    ]
    assert run_cell(stub, FULL, cell, ENCODER.decode).values == (0.5,)


def test_given_answers_of_a_conversation_are_found_in_its_one_script():
    (tokens,) = cell_of("multi_turn", GIVEN).contexts
    (script,) = tokens.scripts
    for turn, asked in zip(tokens.example.turns, tokens.asked, strict=True):
        assert turn.references[0] in ENCODER.decode([script[i] for i in asked])


@pytest.mark.parametrize("answers", ANSWERS)
def test_policies_that_remember_are_asked_one_question_at_a_time(answers):
    cell = cell_of("single_2", answers)
    together, alone = Stub(["?"] * 3), Stub(["?"] * 3, one_at_a_time=True)
    for stub in (together, alone):
        run_cell(stub, FULL, cell, ENCODER.decode)
    assert together.batches == [3] and alone.batches == [1, 1, 1]
    assert alone.restarts == list(cell.contexts[0].question_tokens)


def test_a_method_that_wrote_no_answer_scores_nothing():
    cell = cell_of("copy", WRITTEN, 2)
    assert run_cell(Stub(["", ""]), FULL, cell, ENCODER.decode).mean == 0


CHAT = chat_tokenizer()


class Chatting:
    """Writes `answers` in turn, each until it ends, and then nothing but "!"."""

    one_at_a_time = False

    def __init__(self, answers):
        self.answers = list(answers)

    def restart(self, question_tokens):
        pass

    def decode(self, context, scripts, *, logprobs, ends):
        return [self._follow(Script(script, ends)) for script in scripts]

    def _follow(self, script):
        ids, written = [], []
        while not script.over:
            token = script.wanted
            if token == FREE:
                if not written:
                    written = [*CHAT.encode(self.answers.pop(0)), CHAT.eos_token_id]
                token = written.pop(0)
            ids.append(token)
            script.advance(token)
        return Decoded(ids, [0.0] * len(ids), ids)


@pytest.mark.parametrize("task", ["single_2", "multikey_3", "multi_turn", "table_to_json"])
def test_answers_of_a_chat_are_read_up_to_their_end(task):
    form = form_of(CHAT, Path("none"))
    cell = make_cell(CHAT.backend_tokenizer, task, 2048, 1, 2, 0, WRITTEN, form)
    turns = cell.contexts[0].example.turns
    right = [turn.answer for turn in turns]
    assert run_cell(Chatting(right), FULL, cell, CHAT.decode).values == (1,) * len(turns)
    silent = Chatting(["", *right[1:]])
    expected = (0, *[1 for _ in right[1:]])
    assert run_cell(silent, FULL, cell, CHAT.decode).values == expected


@pytest.mark.parametrize("task", TASKS)
def test_given_answers_of_a_chat(task):
    form = form_of(CHAT, Path("none"))
    cell = make_cell(CHAT.backend_tokenizer, task, 2048, 1, 2, 0, GIVEN, form)
    (tokens,) = cell.contexts
    script = [token for script in tokens.scripts for token in script]
    for turn, asked in zip(tokens.example.turns, tokens.asked, strict=True):
        said = CHAT.decode([script[i] for i in asked]).replace("\n", "")
        assert all(reference in said for reference in turn.references)
    assert set(run_cell(Chatting([]), FULL, cell, CHAT.decode).values) == {1}
