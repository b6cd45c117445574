"""Arithmetic word problems with worked answers: a prompt that needs no download.

They are made in the manner of GSM8K's examples, a dialogue of short questions and answers that
reason in steps, of which the paper's prompt consists. The same number gives the same text.
"""

import random
from collections.abc import Callable

_NAMES = [
    "Ada",
    "Ben",
    "Carla",
    "David",
    "Elif",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Keiko",
    "Liam",
    "Mara",
    "Nils",
    "Olga",
    "Pedro",
    "Qing",
    "Rosa",
    "Samir",
    "Tara",
    "Uma",
    "Viktor",
    "Wanda",
    "Xavier",
    "Yara",
    "Zoe",
]
_FRUITS = ("apples", "pears", "plums", "oranges", "lemons", "peaches", "figs", "mangoes")
_GOODS = ("notebooks", "candles", "mugs", "scarves", "lamps", "clocks", "baskets", "kites")
_PLACES = ("market", "harbour", "school", "library", "fair", "station", "bakery", "garden")
_ANIMALS = ("hens", "goats", "sheep", "ducks", "rabbits", "cows")

Problem = tuple[str, str, int]
"""Question, steps of the answer, result."""


def _shop(rng: random.Random, name: str, other: str) -> Problem:
    thing, count, price = rng.choice(_GOODS), rng.randint(3, 12), rng.randint(2, 19)
    note = -(-count * price // 50) * 50 + 50
    total = count * price
    return (
        f"{name} buys {count} {thing} at {price} dollars each and pays with {note} dollars. "
        f"How much change does {name} get?",
        f"The {thing} cost {count} * {price} = {total} dollars. "
        f"The change is {note} - {total} = {note - total} dollars.",
        note - total,
    )


def _baskets(rng: random.Random, name: str, other: str) -> Problem:
    fruit, baskets, each = rng.choice(_FRUITS), rng.randint(3, 9), rng.randint(11, 29)
    eaten = rng.randint(2, 20)
    total = baskets * each
    return (
        f"At the {rng.choice(_PLACES)} {name} fills {baskets} baskets with {each} {fruit} each. "
        f"{other} eats {eaten} of them. How many {fruit} are left?",
        f"{name} starts with {baskets} * {each} = {total} {fruit}. "
        f"After {other}'s meal there are {total} - {eaten} = {total - eaten} {fruit}.",
        total - eaten,
    )


def _twice(rng: random.Random, name: str, other: str) -> Problem:
    thing, factor, base = rng.choice(_GOODS), rng.randint(2, 6), rng.randint(7, 40)
    more = rng.randint(3, 25)
    theirs = factor * base
    return (
        f"{name} has {base} {thing}. {other} has {factor} times as many, and {more} more on top. "
        f"How many {thing} do they have together?",
        f"{factor} times as many is {factor} * {base} = {theirs}. "
        f"{other} has {theirs} + {more} = {theirs + more} {thing}. "
        f"Together they have {base} + {theirs + more} = {base + theirs + more} {thing}.",
        base + theirs + more,
    )


def _journey(rng: random.Random, name: str, other: str) -> Problem:
    fast, slow = rng.randint(50, 90), rng.randint(20, 45)
    first, second = rng.randint(2, 5), rng.randint(1, 4)
    one, two = fast * first, slow * second
    return (
        f"{name} drives to the {rng.choice(_PLACES)}: {first} hours at {fast} km an hour, then "
        f"{second} hours at {slow} km an hour on a narrow road. How long is the way in km?",
        f"The first part is {fast} * {first} = {one} km. The narrow road is "
        f"{slow} * {second} = {two} km. In all it is {one} + {two} = {one + two} km.",
        one + two,
    )


def _wages(rng: random.Random, name: str, other: str) -> Problem:
    hours, wage, weeks = rng.randint(6, 30), rng.randint(9, 25), rng.randint(2, 8)
    week = hours * wage
    return (
        f"{name} works {hours} hours a week at the {rng.choice(_PLACES)} for {wage} dollars an "
        f"hour. How much does {name} earn in {weeks} weeks?",
        f"One week brings {hours} * {wage} = {week} dollars. "
        f"{weeks} weeks bring {week} * {weeks} = {week * weeks} dollars.",
        week * weeks,
    )


def _share(rng: random.Random, name: str, other: str) -> Problem:
    fruit, friends, each = rng.choice(_FRUITS), rng.randint(3, 8), rng.randint(4, 15)
    kept = rng.randint(2, 12)
    total = friends * each + kept
    return (
        f"{name} picked {total} {fruit}, keeps {kept} and shares the others equally among "
        f"{friends} friends. {other} is one of them. How many {fruit} does {other} get?",
        f"{name} gives away {total} - {kept} = {total - kept} {fruit}. "
        f"Each friend gets {total - kept} / {friends} = {each} {fruit}.",
        each,
    )


def _farm(rng: random.Random, name: str, other: str) -> Problem:
    first, second = rng.sample(_ANIMALS, 2)
    count, factor, sold = rng.randint(8, 30), rng.randint(2, 4), rng.randint(1, 7)
    many = count * factor
    return (
        f"On {name}'s farm there are {count} {first} and {factor} times as many {second}. "
        f"{other} buys {sold} of the {second}. How many animals stay on the farm?",
        f"There were {count} * {factor} = {many} {second}. Without those sold there are "
        f"{many} - {sold} = {many - sold}. With the {first} that makes "
        f"{many - sold} + {count} = {many - sold + count} animals.",
        many - sold + count,
    )


def _reading(rng: random.Random, name: str, other: str) -> Problem:
    daily, days, left = rng.randint(12, 40), rng.randint(4, 14), rng.randint(15, 120)
    read = daily * days
    return (
        f"{name} reads {daily} pages a day of a book with {read + left} pages, borrowed from "
        f"{other}. How many pages are left after {days} days?",
        f"In {days} days {name} reads {daily} * {days} = {read} pages. "
        f"There are {read + left} - {read} = {left} pages left.",
        left,
    )


def _savings(rng: random.Random, name: str, other: str) -> Problem:
    weekly, gift, weeks = rng.randint(5, 20), rng.randint(10, 60), rng.randint(4, 12)
    saved = weekly * weeks
    return (
        f"A bicycle costs {saved + gift} dollars. {other} gives {name} {gift} dollars towards it, "
        f"and {name} saves {weekly} dollars a week. After how many weeks can {name} buy it?",
        f"{name} must save {saved + gift} - {gift} = {saved} dollars. "
        f"That takes {saved} / {weekly} = {weeks} weeks.",
        weeks,
    )


def _ages(rng: random.Random, name: str, other: str) -> Problem:
    young, factor, years = rng.randint(4, 15), rng.randint(3, 4), rng.randint(2, 10)
    old = young * factor
    return (
        f"{other} is {factor} times as old as {name}, who is {young}. "
        f"How old will both be together in {years} years?",
        f"{other} is {young} * {factor} = {old}. Today they are {young} + {old} = {young + old} "
        f"together. In {years} years each is older by {years}, so "
        f"{young + old} + {2 * years} = {young + old + 2 * years}.",
        young + old + 2 * years,
    )


def _rows(rng: random.Random, name: str, other: str) -> Problem:
    rows, seats, empty = rng.randint(8, 25), rng.randint(10, 30), rng.randint(5, 60)
    total = rows * seats
    return (
        f"The hall beside the {rng.choice(_PLACES)} has {rows} rows of {seats} seats. When {name} "
        f"and {other} play there, {empty} seats stay empty. How many people have come?",
        f"The hall has {rows} * {seats} = {total} seats. "
        f"{total} - {empty} = {total - empty} people have come.",
        total - empty,
    )


def _recipe(rng: random.Random, name: str, other: str) -> Problem:
    eggs, cakes, price = rng.randint(2, 6), rng.randint(6, 18), rng.randint(2, 5)
    needed = eggs * cakes
    dozens = -(-needed // 12)
    return (
        f"{name} needs {eggs} eggs for a cake and bakes {cakes} cakes for {other}'s feast. Eggs "
        f"come in boxes of 12 at {price} dollars a box. What do the eggs cost?",
        f"{name} needs {eggs} * {cakes} = {needed} eggs. That takes {dozens} boxes, since "
        f"{dozens} * 12 = {dozens * 12}. They cost {dozens} * {price} = {dozens * price} dollars.",
        dozens * price,
    )


def _tank(rng: random.Random, name: str, other: str) -> Problem:
    inflow, outflow, minutes = rng.randint(12, 30), rng.randint(2, 9), rng.randint(5, 25)
    net = inflow - outflow
    return (
        f"{name} lets {inflow} litres of water a minute into a tank while {outflow} litres a "
        f"minute leak out. How many litres are in it after {minutes} minutes?",
        f"Each minute adds {inflow} - {outflow} = {net} litres. "
        f"After {minutes} minutes there are {net} * {minutes} = {net * minutes} litres.",
        net * minutes,
    )


def _score(rng: random.Random, name: str, other: str) -> Problem:
    goals, points, fouls = rng.randint(5, 20), rng.randint(2, 5), rng.randint(1, 5)
    won = goals * points
    return (
        f"In a game a goal brings {points} points and a foul costs 1 point. {name} has {goals} "
        f"goals and {fouls} fouls, {other} has {won + 3} points. By how many points is {other} "
        f"ahead?",
        f"The goals bring {goals} * {points} = {won} points. With the fouls {name} has "
        f"{won} - {fouls} = {won - fouls}. {other} is ahead by "
        f"{won + 3} - {won - fouls} = {fouls + 3} points.",
        fouls + 3,
    )


_KINDS: tuple[Callable[[random.Random, str, str], Problem], ...] = (
    _shop,
    _baskets,
    _twice,
    _journey,
    _wages,
    _share,
    _farm,
    _reading,
    _savings,
    _ages,
    _rows,
    _recipe,
    _tank,
    _score,
)


def word_problems(count: int) -> str:
    """The first `count` problems, each with its answer, as one text.

    A longer text starts with the shorter ones.
    """
    rng = random.Random(0)
    parts = []
    for number in range(count):
        if number % len(_KINDS) == 0:
            kinds = rng.sample(_KINDS, len(_KINDS))
        name, other = rng.sample(_NAMES, 2)
        question, steps, result = kinds[number % len(_KINDS)](rng, name, other)
        parts.append(f"Question: {question}\nAnswer: {steps} The answer is {result}.\n\n")
    return "".join(parts)
