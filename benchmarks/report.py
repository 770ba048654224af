"""Brings the result files into the pages of docs/ that have tables: fills what stands between their markers.

    python benchmarks/report.py

A marker names a result file and, after a colon, one of its tables: <!-- table layer_step:0 --> ... <!-- end -->.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

from common import RESULTS, Table

DOCS = Path(__file__).parent.parent / "docs"
PAGES = (DOCS / "performance.md", DOCS / "quantization.md")
MARKER = re.compile(r"(<!-- table (\w+):(\d+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(table: Table, machine: dict[str, Any]) -> str:
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    lines = [f"| {' | '.join(cells)} |" for cells in (table.columns, rule, *table.rows)]
    where = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} threads"
    title = table.title[0].upper() + table.title[1:]
    source = f"({where}, load average {machine['load average']}, {machine['date']})"
    return "\n".join([f"{title} {source}:", "", *lines, ""])


def filled(match: re.Match[str]) -> str:
    name, index = match[2], int(match[3])
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return f"{match[1]}Not measured yet: there is no benchmarks/results/{name}.json.\n{match[4]}"
    result = json.loads(path.read_text())
    script = importlib.import_module(name.removesuffix("_cuda"))
    return f"{match[1]}{markdown(script.tables(result)[index], result['machine'])}{match[4]}"


def main() -> None:
    for page in (page for page in PAGES if page.exists()):
        page.write_text(MARKER.sub(filled, page.read_text()))
        print(f"written: {page}")


if __name__ == "__main__":
    main()
