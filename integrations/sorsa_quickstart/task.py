"""The fine-tuning task of the quickstart: how much change does a buyer get? The base model never met such a question.

The base model can add and subtract numbers that it is given, also in a row, if asked in the words of
`benchmarks/quickstart_base/corpus.py`. This task speaks of prices and buyers instead. It needs the two steps in an
order that the corpus never shows: the second step subtracts the result of the first. It ends with a line `#### 13`, as
in GSM8K.
"""

from __future__ import annotations

import random
import re
import zlib

GOODS = (
    "lantern", "kettle", "basket", "candle", "mirror", "ladder", "blanket", "pillow", "bucket", "hammer",
    "compass", "whistle", "saddle", "teapot", "carpet", "helmet",
)  # fmt: skip
BUYERS = ("Mia", "Leo", "Olga", "Hugo", "Ruth", "Ines", "Noah", "Elsa")
PRICES = (
    "In the shop a {0} costs {a} coins and a {1} costs {b}.",
    "Prices in coins: {0} {a}, {1} {b}.",
    "The shop asks {a} coins for a {0} and {b} for a {1}.",
)
PURCHASES = (
    "{who} buys both and pays with {paid} coins. How much change?",
    "{who} pays {paid} coins for the {0} and the {1}. How much change?",
)
TEST_PART = 8
"""One question in this many belongs to the test set, by the checksum of its sums. Those are never trained on."""

_FINAL = re.compile(r"####\s*(-?\d[\d,]*)\s*$")


def _question(rng: random.Random) -> tuple[dict[str, str], bool]:
    """One question with its worked answer, and whether it belongs to the test set."""
    goods = rng.sample(GOODS, 2)
    first, second = rng.randint(2, 18), rng.randint(2, 18)
    total = first + second
    paid = rng.randint(total + 1, 40)
    shop = rng.choice(PRICES).format(*goods, a=first, b=second)
    bought = rng.choice(PURCHASES).format(*goods, who=rng.choice(BUYERS), paid=paid)
    work = f"{first} + {second} = {total}, {paid} - {total} = {paid - total}"
    example = {"prompt": f"Question: {shop} {bought}\nAnswer:", "completion": f" {work}\n#### {paid - total}"}
    return example, zlib.crc32(work.encode()) % TEST_PART == 0


def _examples(count: int, seed: int, test: bool) -> list[dict[str, str]]:
    """`count` different questions of one part."""
    if count < 0:
        raise ValueError(f"The number of examples must not be negative, but it is {count}.")
    rng = random.Random(f"change/{seed}/{test}")
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        example, held_out = _question(rng)
        if held_out == test:
            found[example["prompt"]] = example
    return list(found.values())


def train_examples(count: int = 4000, seed: int = 0) -> list[dict[str, str]]:
    """Training examples, each a dict with `prompt` and `completion`; the same for the same arguments.

    >>> train_examples(1)[0]["prompt"].startswith("Question: ")
    True
    """
    return _examples(count, seed, test=False)


def test_examples(count: int = 150, seed: int = 0) -> list[dict[str, str]]:  # noqa: PT028
    """Held-out examples; no training example of any seed has the same three numbers in the same order."""
    return _examples(count, seed, test=True)


test_examples.__test__ = False  # type: ignore[attr-defined]  # pytest must not collect it


def final_number(text: str) -> str | None:
    """The number on a closing `####` line; None if there is no such line at the end."""
    match = _FINAL.search(text.strip())
    return match.group(1).replace(",", "") if match else None


def is_correct(example: dict[str, str], completion_text: str) -> bool:
    """Whether a generated completion ends with `####` and the right number.

    >>> is_correct({"prompt": "", "completion": " 1 + 2 = 3, 9 - 3 = 6\\n#### 6"}, " so it is #### 6")
    True
    """
    return final_number(completion_text) == final_number(example["completion"])
