"""The code blocks of a page of documentation, and what the page says about those that are not run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}

SHOWN = ("text", "mermaid", "bibtex")
"""Languages of blocks that are read, not run."""

NOT_RUN = re.compile(r"<!-- not run here: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: name of its file.
        line: of its fence, from 1.
        language: the word after the fence; empty without one.
        code: what is between the fences.
        why_not: the reason in the comment above it, which a reader of the page does not see; None if it is run.
    """

    page: str
    line: int
    language: str
    code: str
    why_not: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    found, lines = [], PAGES[page].read_text(encoding="utf-8").splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        mark = NOT_RUN.fullmatch(lines[start - 1])
        language = lines[start].strip().removeprefix("```")
        code = "\n".join(lines[start + 1 : number]) + "\n"
        found.append(Block(page, start + 1, language, code, mark and mark[1]))
        start = None
    assert start is None, f"{page}:{start} opens a block that nothing closes"
    return found


def indented_code(page: str) -> list[int]:
    """Lines that Markdown takes for code because they are indented by four spaces, outside of fences."""
    found, fenced, above = [], False, ""
    for number, line in enumerate(PAGES[page].read_text(encoding="utf-8").splitlines(), start=1):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and line.startswith("    ") and not above:
            found.append(number)
        above = line.strip()
    return found


def commands(block: Block) -> list[list[str]]:
    """The command lines of a shell block as words, comments left out."""
    joined = block.code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in joined) if words]


def sides(block: Block) -> tuple[str, str]:
    """The text before and after a diff."""
    lines = block.code.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    return before, "\n".join(line[1:] for line in lines if not line.startswith("-"))
