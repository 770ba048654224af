"""Words, numbers, lists and answer styles out of which `corpus.py` makes its questions."""

from __future__ import annotations

import random

HELD_OUT_WORDS = ("cost", "coin", "buy", "pay", "change", "shop", "lantern", "kettle", "####")
"""Strings that belong to the fine-tuning task and never occur in the corpus."""


def _split(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


NAMES = _split(
    "Anna Ben Carl Dora Emil Fay Gus Hana Ivan Jane Kofi Lena Max Nina Omar Pia Quinn Rosa Sam Tara "
    "Umar Vera Will Xena Yuri Zoe"
)
KINDS = _split(
    "apple pear plum fig lime hen cow goat duck sheep pen book card clip doll kite ball car block cup "
    "plate fork shell stone leaf seed hat sock glove coat lamp chair bench drum flute bell"
)
WORDS = _split(
    "red blue green old new big small north south day night sun moon rain snow tree river hill road house "
    "door hand foot head fast slow warm cold long short one two three first last this that with from over under"
)
ONSETS = _split("b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kn pl sh sk sl sp st th tr")
CODAS = ["", "", "", "n", "r", "s", "t", "l", "m", "nd", "st", "ck", "ng", "sk", "rn", "mp"]

REPEAT = ("Repeat: ", "Copy this: ", "Say again: ")

TOP = 40
"""The largest number that occurs."""


def invented(rng: random.Random) -> str:
    """A made-up word, so that the model learns to copy words it has never seen."""
    while True:
        count = rng.choice((1, 1, 2))
        word = "".join(rng.choice(ONSETS) + rng.choice("aeiou") + rng.choice(CODAS) for _ in range(count))
        if len(word) > 2 and not any(held in word for held in HELD_OUT_WORDS):
            return word


def number(rng: random.Random, top: int = TOP) -> int:
    """A number in 1..top, small ones a little more often."""
    return rng.randint(1, rng.choice((max(1, top // 3), top, top)))


def distinct(rng: random.Random, pool: list[str], count: int, made_up: float = 0.15) -> list[str]:
    """`count` different words, some of them invented."""
    words: list[str] = []
    while len(words) < count:
        word = invented(rng) if rng.random() < made_up else rng.choice(pool)
        if word not in words:
            words.append(word)
    return words


# How an answer is asked for, and how it is then written: {v} is the answer, {w} the work that leads to it.
DIRECT = [
    (("Just the number.", "Only the result.", "Be brief."), "{v}"),
    (("Write a sentence.", "Answer in words.", "Be polite."), "The answer is {v}."),
    (("Use brackets.", "Put it in brackets."), "[{v}]"),
    (("Mark it.", "Give it a mark."), "= {v}"),
    (("Say so.", "Tell us."), "So it is {v}!"),
]
WORKED = [
    (("Show the work.", "Work it out.", ""), "{w}"),
    (("Work, then answer.", "Show the work and say the answer."), "{w}. The answer is {v}."),
    (("Work, then brackets.", "Show the work, use brackets."), "{w} [{v}]"),
    (("Work on lines.", "Show the work, then a line."), "{w}\nResult: {v}"),
    (("Work, then say so.", "Show the work and tell us."), "{w}; so it is {v}!"),
]


def styled(rng: random.Random, question: str, value: object, work: str | None) -> tuple[str, str]:
    """The question with a request for one answer style, and the answer in that style."""
    requests, form = rng.choice(DIRECT if work is None else WORKED)
    request = rng.choice(requests)
    if request:
        question = f"{question} {request}" if rng.random() < 0.6 else f"{request} {question}"
    return question, form.format(v=value, w=work)


def listing(rng: random.Random, names: list[str], values: list[int]) -> str:
    """A list of named numbers in one of many layouts."""
    rows = list(zip(names, values, strict=True))
    layout = rng.randrange(10)
    if layout == 0:
        return ", ".join(f"{n}: {v}" for n, v in rows) + "."
    if layout == 1:
        return "; ".join(f"{n} = {v}" for n, v in rows) + "."
    if layout == 2:
        return "\n".join(f"{n} | {v}" for n, v in rows) + "\n"
    if layout == 3:
        verb = rng.choice(("has", "holds", "got", "is at", "takes", "weighs", "made"))
        return " ".join(f"{n} {verb} {v}." for n, v in rows)
    if layout == 4:
        start = ", ".join(f"{v} {n}" for n, v in rows[:-1])
        return f"There are {start} and {rows[-1][1]} {rows[-1][0]}."
    if layout == 5:
        return "\n".join(f"- {v} {n}" for n, v in rows) + "\n"
    if layout == 6:
        verb = rng.choice(("has", "gives", "weighs", "needs", "counts for"))
        unit = rng.choice(("points", "grams", "steps", "marks"))
        return " ".join(f"The {n} {verb} {v} {unit}." for n, v in rows)
    if layout == 7:
        verb = rng.choice(("has", "gives", "weighs", "needs", "counts for"))
        start = ", ".join([f"A {rows[0][0]} {verb} {rows[0][1]}"] + [f"a {n} {v}" for n, v in rows[1:-1]])
        return f"{start} and a {rows[-1][0]} {rows[-1][1]}."
    if layout == 8:
        return "Notes: " + " / ".join(f"{v} for the {n}" for n, v in rows) + "."
    return " ".join(f"{n}({v})" for n, v in rows) + "."
