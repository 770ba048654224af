"""docs/support.md sums tests up in sentences: each is tied to tests that exist, and says so where one of them fails."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from promises.support_claims import CLAIMS, Claim
from promises.support_table import Result, sentences

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
ALL = [claim for claims in CLAIMS.values() for claim in claims]

CLAIM = Claim("Works", "It flies.", ("test_wings::test_it_flies",))
PASSED = Result("tests.test_wings", "test_it_flies_far", "", "passed", "", [])


def shown() -> list[str]:
    """ "file::test" of every test whose result the page is written from."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    text = re.search(r"^SHOWN := (.+)$", makefile, flags=re.MULTILINE)
    assert text is not None
    words = re.sub(r"\$\(addprefix (\S+),([^)]+)\)", lambda m: " ".join(m[1] + word for word in m[2].split()), text[1])
    paths = [ROOT / word for word in words.split()]
    files = [file for path in paths for file in (path.rglob("test_*.py") if path.is_dir() else [path])]
    return [
        f"{file.stem}::{name}"
        for file in files
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]


def test_every_sentence_sums_up_tests_that_exist() -> None:
    names = shown()
    assert len(names) > 100
    patterns = [pattern for claim in ALL for pattern in claim.tests]
    assert [pattern for pattern in patterns if not any(re.match(pattern, name) for name in names)] == []


def test_the_page_has_every_sentence() -> None:
    assert [claim.sentence for claim in ALL if claim.sentence not in PAGE] == []


@pytest.mark.parametrize(
    ("outcomes", "line"),
    [
        (["passed", "passed"], "- **Works:** It flies."),
        (["passed", "failed"], "- **Works:** It flies. **NOT SO: 1 of 2 tests of it fail.**"),
        (["skipped"], "- **Works:** It flies. (Skipped in this run.)"),
    ],
)
def test_a_sentence_says_what_became_of_its_tests(outcomes: list[str], line: str) -> None:
    results = [replace(PASSED, outcome=outcome) for outcome in outcomes]
    assert sentences([CLAIM], results) == line


def test_a_sentence_without_its_test_stops_the_generator() -> None:
    with pytest.raises(ValueError, match=r"'It flies\.' sums up test_wings::test_it_flies, which no test"):
        sentences([CLAIM], [replace(PASSED, where="tests.test_fins")])
