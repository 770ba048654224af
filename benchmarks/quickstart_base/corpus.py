"""Generates, from a seed, the synthetic questions and answers that the base model is trained on.

Nothing here is natural text: every example is a short question about a few numbers or words, and its only
right answer. The words of the fine-tuning task (`task.py`) are kept out on purpose: see `wording.HELD_OUT_WORDS`.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .wording import (
    HELD_OUT_WORDS,
    KINDS,
    NAMES,
    ONSETS,
    REPEAT,
    TOP,
    WORDS,
    distinct,
    listing,
    number,
    styled,
)

Make = Callable[[random.Random], tuple[str, str, str]]


@dataclass(frozen=True)
class Example:
    """One question of the corpus with its answer; `completion` starts right after `prompt`."""

    skill: str
    prompt: str
    completion: str


def lookup(rng: random.Random) -> tuple[str, str, str]:
    """Finds one number of a list."""
    names = distinct(rng, rng.choice((NAMES, KINDS)), rng.randint(2, 4))
    values = [number(rng) for _ in names]
    pick = rng.randrange(len(names))
    ask = rng.choice(
        (
            "What is next to {n}?",
            "What number is with {n}?",
            "Find {n}.",
            "{n}?",
            "How many for the {n}?",
            "Look up {n}.",
        )
    )
    question = f"{listing(rng, names, values)} {ask.format(n=names[pick])}"
    return ("lookup", *styled(rng, question, values[pick], None))


def sums(rng: random.Random) -> tuple[str, str, str]:
    """A line of additions and subtractions."""
    parts = []
    for _ in range(rng.randint(2, 7)):
        a, b = pair(rng)
        parts.append((f"{a} + {b}", a + b) if rng.random() < 0.5 else (f"{a + b} - {b}", a))
    if rng.random() < 0.5:
        ask = rng.choice(("Do these: ", "Sums: ", "Work these out: ", ""))
        return "sums", ask + "; ".join(p for p, _ in parts), "; ".join(f"{p} = {v}" for p, v in parts)
    ask = rng.choice(("Results of ", "Short: ", "Only results: "))
    return "sums", ask + "; ".join(p for p, _ in parts), "; ".join(str(v) for _, v in parts)


def pair(rng: random.Random) -> tuple[int, int]:
    """Two numbers whose sum is at most TOP."""
    total = rng.randint(2, TOP)
    first = rng.randint(1, total - 1)
    return first, total - first


def story(rng: random.Random) -> tuple[str, str, str]:
    """One addition or subtraction told in words."""
    a, b = pair(rng)
    who, thing = distinct(rng, NAMES, 1)[0], distinct(rng, KINDS, 1)[0]
    if rng.random() < 0.5:
        text = rng.choice(
            ("{who} has {a} {thing}s and gets {b} more. How many now?", "What is {a} and {b} together?",
             "{who} saw {a} {thing}s, then {b} more {thing}s. How many in all?", "Add {b} to {a}.",
             "First {a}, then {b}. Total?", "Put {a} with {b}.")
        )  # fmt: skip
        work, value, left, right = f"{a} + {b} = {a + b}", a + b, a, b
    else:
        text = rng.choice(
            ("{who} has {a} {thing}s and gives away {b}. How many are left?", "What is {a} less {b}?",
             "There were {a} {thing}s. {who} took {b}. How many stay?", "Take {b} from {a}.",
             "{who} needs {a} {thing}s and has {b}. How many are missing?", "How far is it from {b} to {a}?")
        )  # fmt: skip
        left, right = a + b, b
        work, value = f"{left} - {right} = {a}", a
    question = text.format(who=who, thing=thing, a=left, b=right)
    return ("story", *styled(rng, question, value, work if rng.random() < 0.6 else None))


def together(rng: random.Random) -> tuple[str, str, str]:
    """Finds two numbers of a list, then adds or subtracts them."""
    pool = rng.choice((NAMES, KINDS))
    names = distinct(rng, pool, rng.randint(2, 4))
    values = [number(rng, TOP // 2) for _ in names]
    i, j = rng.sample(range(len(names)), 2)
    x, y = names[i], names[j]
    if rng.random() < 0.6:
        ask = rng.choice(
            ("{x} and {y} together?", "Add {x} and {y}.", "How many for the {x} and the {y}?",
             "{x} plus {y}?", "What do the {x} and the {y} make in all?", "Sum of {x} and {y}?",
             "Take the {x} and the {y}. Total?")
        )  # fmt: skip
        work, value = f"{values[i]} + {values[j]} = {values[i] + values[j]}", values[i] + values[j]
    else:
        if values[i] < values[j]:
            i, j, x, y = j, i, y, x
        ask = rng.choice(
            ("How many more is {x} than {y}?", "{x} minus {y}?", "Take {y} from {x}.",
             "How far is {y} below {x}?", "What is left of the {x} without the {y}?")
        )  # fmt: skip
        work, value = f"{values[i]} - {values[j]} = {values[i] - values[j]}", values[i] - values[j]
    if rng.random() < 0.25:
        ask = f"{rng.choice(NAMES)} asks: {ask}"
    return ("together", *styled(rng, f"{listing(rng, names, values)} {ask.format(x=x, y=y)}", value, work))


def chain(rng: random.Random) -> tuple[str, str, str]:
    """Two or three steps in a row, each starting from the last result."""
    value = start = rng.randint(5, 25)
    who, thing = rng.choice(NAMES), distinct(rng, KINDS, 1)[0]
    told, work = [], []
    for _ in range(rng.randint(2, 3)):
        up = rng.random() < 0.5 if 5 < value < TOP - 5 else value <= 5
        step = rng.randint(1, TOP - value) if up else rng.randint(1, value - 1)
        told.append(rng.choice(("gets {0}", "adds {0}", "finds {0} more") if up else
                               ("loses {0}", "gives away {0}", "takes away {0}")).format(step))  # fmt: skip
        after = value + step if up else value - step
        work.append(f"{value} {'+' if up else '-'} {step} = {after}")
        value = after
    link = rng.choice((", then ", ", and ", ". Then {who} ")).format(who=who)
    opening = rng.choice(("{who} has {s} {t}s, ", "{who} starts with {s} {t}s, ", "{who} has {s} and "))
    ask = rng.choice(("How many now?", "What is left?", "Count at the end?"))
    question = f"{opening.format(who=who, s=start, t=thing)}{link.join(told)}. {ask}"
    return ("chain", *styled(rng, question, value, ", ".join(work)))


def rows(rng: random.Random) -> tuple[str, str, str]:
    """Repeats a long row of words, numbers and letters: the densest lesson in copying."""
    pools = rng.choice(((WORDS, NAMES, KINDS), (WORDS, [str(n) for n in range(TOP + 1)]), (ONSETS, KINDS)))
    row = " ".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(8, 24)))
    return "rows", f"{rng.choice(REPEAT)}{row}", row


SKILLS: dict[str, tuple[Make, float]] = {
    "lookup": (lookup, 0.2),
    "sums": (sums, 0.3),
    "story": (story, 0.12),
    "together": (together, 0.22),
    "chain": (chain, 0.12),
    "rows": (rows, 0.04),
}
"""Every skill with its share of the corpus."""

FRAMES = (
    ("Question: {q}\nAnswer:", " "),
    ("Q: {q}\nA:", " "),
    ("{q}\n", ""),
    ("{q} ->", " "),
    ("<|user|>\n{q}<|end|>\n<|assistant|>\n", ""),
)
"""Ways to lay out a question (the last one is the chat template), with what then comes before the answer."""


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the evaluation part (one in fifty, by its checksum)."""
    return zlib.crc32(prompt.encode()) % 50 == 0


def generate(seed: int, held_out: bool = False, only: str | None = None) -> Iterator[Example]:
    """An endless stream of examples; the training and the held-out stream share no prompt.

    >>> next(generate(0)) == next(generate(0))
    True
    """
    if only is not None and only not in SKILLS:
        raise ValueError(f"There is no skill named {only!r}; the skills are {', '.join(SKILLS)}.")
    rng = random.Random(f"{seed}/{held_out}/{only}")
    makes = [SKILLS[only][0]] if only else [make for make, _ in SKILLS.values()]
    shares = [1.0] if only else [share for _, share in SKILLS.values()]
    while True:
        skill, question, answer = rng.choices(makes, shares)[0](rng)
        if any(word in question or word in answer for word in HELD_OUT_WORDS):
            continue
        frame, gap = rng.choice(FRAMES)
        prompt = frame.format(q=question.strip())
        if is_held_out(prompt) == held_out:
            yield Example(skill, prompt, gap + answer)
