"""Writes the tables of the result files into the pages of docs that show them, between their markers.

    python benchmarks/report.py

A marker names a result file: <!-- layer_step --> ... <!-- end -->.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from common import RESULTS

PAGES = [
    Path(__file__).parent.parent / "docs" / name
    for name in ("performance.md", "folding.md", "quantization.md", "results.md", "scaling.md")
]
MARKER = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(match: re.Match[str]) -> str:
    name = match[1]
    path = RESULTS / f"{name}.json"
    body = f"Not run yet: there is no {name}.json in benchmarks/results."
    if path.exists():
        result = json.loads(path.read_text())
        machine, table = result["machine"], result["table"]
        where = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} threads"
        rule = ["---", *["---:"] * (len(table["columns"]) - 1)]
        lines = [f"| {' | '.join(cells)} |" for cells in (table["columns"], rule, *table["rows"])]
        source = f"({where}, load average {machine['load average']}, {machine['date']})"
        body = "\n".join([f"{table['title'][0].upper()}{table['title'][1:]} {source}", "", *lines])
    return f"<!-- {name} -->\n{body}\n<!-- end -->"


def main() -> None:
    for page in PAGES:
        page.write_text(MARKER.sub(filled, page.read_text()))
        print(f"written: docs/{page.name}")


if __name__ == "__main__":
    main()
