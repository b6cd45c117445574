"""The tasks, by name. To add one: write a class with `name` and `make`, and list it here."""

from accuracy.tasks.base import Example, Source, Task, Turn
from accuracy.tasks.needles import Needles
from accuracy.tasks.reading import Copy, LateRecall, QuestionAnswering
from accuracy.tasks.table import TableToJson
from accuracy.tasks.tracking import Chain, VariableTracking
from accuracy.tasks.words import CommonWords, FrequentWords

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Needles("single_1", filler="noise"),
        Needles("single_2"),
        Needles("single_3", long_values=True),
        Needles("multikey_1", distractors=4),
        Needles("multikey_2", distractors=None),
        Needles("multikey_3", distractors=None, long_values=True, long_keys=True),
        Needles("multivalue", values_per_key=4),
        Needles("multiquery", keys_per_turn=4),
        VariableTracking(),
        CommonWords(),
        FrequentWords(),
        QuestionAnswering(),
        Copy(),
        Needles("multi_turn", distractors=8, conversation=True),
        Chain(),
        LateRecall(),
        TableToJson(),
    )
}
RULER = (
    *(f"single_{n}" for n in (1, 2, 3)),
    *(f"multikey_{n}" for n in (1, 2, 3)),
    *("multivalue", "multiquery", "variable_tracking", "common_words", "frequent_words"),
)
"""The names of RULER's eleven synthetic tasks."""

__all__ = ["RULER", "TASKS", "Example", "Source", "Task", "Turn"]
