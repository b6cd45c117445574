"""Examples as chats: the template around them, the context apart, the right length."""

from pathlib import Path

import pytest
from accuracy.evaluate import GIVEN, WRITTEN, make_cell
from accuracy.fitting import adds_up
from accuracy.prompts import COMPLETION, Chat, form_of
from accuracy.scripts import FREE
from accuracy.tasks import RULER, TASKS, Example, Turn
from chat import chat_tokenizer

TOKENIZER = chat_tokenizer()
ENCODER = TOKENIZER.backend_tokenizer
CHAT = form_of(TOKENIZER, Path("none"))
TURNS = (Turn("Who?", " I.", ("I",), begun="It is"), Turn("Where?", " Here.", ("Here",)))
END = TOKENIZER.eos_token_id


def test_who_has_a_template_is_asked_in_it():
    assert isinstance(CHAT, Chat) and CHAT.ends == {END}
    plain = chat_tokenizer()
    plain.chat_template = None
    assert form_of(plain, Path("none")) is COMPLETION


def test_ends_of_the_generation_config_count(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert form_of(TOKENIZER, tmp_path).ends == {3, 5, END}


def test_questions_over_a_context_share_what_stands_before_it():
    prompt = CHAT.prompt(Example("A long text.\n", TURNS, "Read this."), conversation=False)
    assert prompt.context == "<|im_start|>user\nRead this.\n\nA long text."
    assert prompt.questions == tuple(
        f"\n\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in ("Who?", "Where?")
    )


def test_a_conversation_is_one():
    prompt = CHAT.prompt(Example("A long text.\n", TURNS, "Read this."), conversation=True)
    header = "<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.questions == (
        f"\n\nWho?{header}",
        f"<|im_end|>\n<|im_start|>user\nWhere?{header}",
    )


@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_right_though_tokens_do_not_add_up(task):
    assert not adds_up(ENCODER)
    cell = make_cell(ENCODER, task, 4000, 1, 2, 0, WRITTEN, CHAT)
    (tokens,) = cell.contexts
    given = make_cell(ENCODER, task, 4000, 1, 2, 0, GIVEN, CHAT).contexts[0]
    assert given.context == tokens.context
    assert len(given.context) + max(map(len, given.scripts)) == tokens.size
    assert 0.98 * 4000 <= tokens.size <= 4000


@pytest.mark.parametrize("task", TASKS)
def test_begun_answers_stand_before_free_ones(task):
    (tokens,) = make_cell(ENCODER, task, 2000, 1, 2, 0, WRITTEN, CHAT).contexts
    turn = tokens.example.turns[-1]
    given = [token for token in tokens.scripts[-1] if token != FREE]
    assert tokens.scripts[-1][-1] == FREE
    assert TOKENIZER.decode(given).endswith(f"assistant\n{turn.begun}")
    # A policy that watches the question does not see the answer's beginning as part of it.
    if len(tokens.scripts) == 1 == len(tokens.example.turns):
        question = TOKENIZER.decode(given[: tokens.question_tokens[0]])
        assert question.endswith("<|im_start|>assistant\n")


def test_ruler_asks_once_what_it_defines_for_one_question():
    turns = {
        task: len(make_cell(ENCODER, task, 3000, 1, 6, 0, WRITTEN, CHAT).contexts[0].example.turns)
        for task in RULER
    }
    several = {"multikey_1": 4, "multikey_2": 6, "multikey_3": 6}
    assert turns == {task: several.get(task, 1) for task in RULER}


def test_a_conversation_has_five_questions():
    (tokens,) = make_cell(ENCODER, "multi_turn", 3000, 1, 2, 0, WRITTEN, CHAT).contexts
    assert len(tokens.example.turns) == 5 and len(tokens.scripts) == 1
