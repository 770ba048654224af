"""An analysis as one page: it needs no other file, holds every number, and is written whole or not at all."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin import Analysis
from sorsa_plugin.tools.analysis.report import COLUMNS, HEALTHY, html_report


class Page(HTMLParser):
    """The rows of a page's tables, and what it loads or points to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page(analysis: Analysis) -> str:
    return html_report(analysis)


def test_the_page_holds_every_mean_and_every_weight_at_the_last_step(page: str, analysis: Analysis) -> None:
    rows = Page(page).rows
    for summary in analysis.summaries():
        assert [summary.run, str(summary.step), "6", *(column.show(summary) for column in COLUMNS)] in rows
    for run in analysis.runs:
        for change in analysis.last(run):
            shape = f"{change.out_features} x {change.in_features}"
            assert [change.module, shape, *(column.show(change) for column in COLUMNS)] in rows
    assert len(rows) == 1 + len(analysis.summaries()) + 3 * (1 + 6)


def test_the_page_needs_no_other_file_and_says_what_it_shows(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    pictures = [source for source in parsed.loaded if source.startswith("data:image/png;base64,")]
    assert len(pictures) == 4
    assert all(base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG") for source in pictures)
    assert set(parsed.loaded) - set(pictures) == {"https://arxiv.org/abs/2409.00055"}
    assert "url(" not in page
    assert "<script" not in page
    assert HEALTHY.replace(">", "&gt;") in page
    assert all(f"<dt>{column.heading}</dt><dd>" in page for column in COLUMNS)


def test_names_of_files_are_text_not_markup(analysis: Analysis) -> None:
    named = Analysis("<b>base</b>", (), None, 1e-6, (), {})
    assert "&lt;b&gt;base" in html_report(named, charts=False)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), ["analyze", *map(str, arguments)])


@pytest.fixture
def given(runs: Path) -> list[object]:
    return ["--base", runs / "base", "--adapter", runs / "sorsa" / "checkpoint-4"]


def test_the_command_writes_the_page_alone_or_into_the_directory(given: list[object], tmp_path: Path) -> None:
    done = command(*given, "--html", tmp_path / "new" / "report.html", "--no-plots")
    assert done.exit_code == 0, done.output
    assert "report.html." in done.output
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    assert "sorsa/checkpoint-4" in (tmp_path / "new" / "report.html").read_text()
    assert "<img" not in (tmp_path / "new" / "report.html").read_text()
    done = command(*given, "-o", tmp_path / "out", "--html", tmp_path / "out" / "report.html", "--no-plots")
    assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"layers.csv", "summary.csv", "analysis.json", "report.html"}


def test_a_page_that_cannot_be_written_is_refused_before_the_work(given: list[object], tmp_path: Path) -> None:
    missing = ["--base", tmp_path / "no-base", *given[2:]]  # reading it would be another error
    (tmp_path / "mine.html").write_text("mine")
    for options, message in (
        (["--html", tmp_path / "mine.html"], "mine.html exists; expected the path of a new file"),
        (["--html", tmp_path], "exists; expected the path of a new file"),
        (["--html", tmp_path / "mine.html" / "page"], "mine.html is a file"),
        (["--html", tmp_path / "a", "-o", tmp_path / "a" / "b"], "needs a directory"),
        (["--html", tmp_path / "a", "-o", tmp_path / "a"], "needs a directory"),
        ([], "There is no place for the results"),
    ):
        done = command(*missing, *options)
        assert done.exit_code == 1
        assert re.sub(r"\s+", " ", done.output).count(message) == 1, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.html"]
    assert (tmp_path / "mine.html").read_text() == "mine"
