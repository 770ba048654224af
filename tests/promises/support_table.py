"""Writes docs/support.md from the results of tests: `make support-table`.

    PYTHONPATH=tests python tests/promises/support_table.py OWN.xml PEFT.xml ... > docs/support.md

The files are pytest's --junit-xml: the first of this package's own tests, the others of `peft_conformance/run.py`. What
was not run is left empty, and what failed is said to fail. The sentences are those of `support_claims.py`.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

from promises.support_claims import CLAIMS, Claim, Kind

CAPABILITIES = {
    "start and disabled equal the base, bit for bit": ("test_a_new_or_disabled_adapter_gives", None),
    "trains": ("test_gradients_are_those|test_an_optimizer_step_trains", None),
    "saves, loads": ("test_saved_and_loaded_it_gives", None),
    "merges, unloads": ("test_merging_keeps|test_unloading_gives", None),
    "several adapters": ("test_a_second_adapter_adds", None),
    "mixed batches": ("test_mixed_batches_give_each_row", "test_mixed_batches_are_refused"),
    "dropout": ("test_dropout_drops_inputs", "test_dropout_is_refused"),
    "LoRA export": ("test_plain_peft_gives_the_same|test_plain_peft_finds", "test_what_lora_computes_otherwise"),
    "torch.compile": ("test_every_layer_kind_compiles", None),
}
"""{column: tests that show it works, test that shows it is refused}, of tests/layers/kinds."""
LIFE_CYCLE = (
    "test_adapter_options",
    "test_loading_and_generating",
    "test_mixed_batch",
    "test_compile",
    "test_compiled_kinds",
    "test_peft_integration",
    "test_layer",
    "test_bit_equal_start",
    "test_base_model_untouched",
    "test_initialise",
    "test_layer_choice",
    "test_model",
    "test_ranks",
    "test_tied",
    "test_config",
)
"""Files whose tests are listed by name."""
WORDS = {"pefts": "PEFT's", "peft": "PEFT", "lora": "LoRA", "loras": "LoRA's", "sorsa": "SORSA", "llama": "Llama"}


@dataclass
class Result:
    """One test: its folders and file, its name, what its brackets hold, and how it ended."""

    where: str
    name: str
    case: str
    outcome: str  # passed, skipped, failed or xfailed
    reason: str
    properties: list[tuple[str, str]]

    @property
    def words(self) -> str:
        """The name as a sentence."""
        words = self.name.removeprefix("test_").split("_")
        return " ".join(WORDS.get(word, word) for word in words)


def read(path: str) -> tuple[dict[str, str], list[Result]]:
    """Versions and date, and the results, of one file."""
    suite = ElementTree.parse(path).getroot()[0]
    about = {item.get("name", ""): item.get("value", "") for item in suite.findall("./properties/property")}
    about["date"] = suite.get("timestamp", "")[:10]
    return about, [_result(case) for case in suite.iter("testcase")]


def _result(case: ElementTree.Element) -> Result:
    name, _, parameters = case.get("name", "").partition("[")
    skipped = case.find("skipped")
    failed = case.find("failure") is not None or case.find("error") is not None
    expected = skipped is not None and skipped.get("type") == "pytest.xfail"
    outcome = "failed" if failed else "xfailed" if expected else "skipped" if skipped is not None else "passed"
    reason = "" if skipped is None else skipped.get("message", "")
    reason = re.sub(r"<class '[\w.]+\.(\w+)'>|(SORSAConfig)\(.*\)", r"\1\2", reason)
    properties = [(item.get("name", ""), item.get("value", "")) for item in case.iter("property")]
    return Result(case.get("classname", ""), name, parameters.removesuffix("]"), outcome, reason, properties)


def versions(about: dict[str, str]) -> str:
    return ", ".join(f"{name} {about[name]}" for name in ("peft", "transformers", "torch") if name in about)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(columns), ["---"] * len(list(columns)), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def verdict(results: list[Result]) -> str:
    """ "yes" where every test passed."""
    failed = sum(result.outcome == "failed" for result in results)
    if failed:
        return f"FAILS ({failed} of {len(results)})"
    return "yes" if any(result.outcome == "passed" for result in results) else ""


def sentences(claims: Iterable[Claim], results: list[Result]) -> str:
    """What works, what differs from LoRA, and what does not work, a line for each sentence.

    Raises:
        ValueError: a sentence sums up a test that is not among the results.
    """
    lines: dict[Kind, list[str]] = defaultdict(list)
    for claim in claims:
        lines[claim.kind].append(claim.sentence + _doubt(claim, results))
    return _lines(lines)


def _doubt(claim: Claim, results: list[Result]) -> str:
    """Empty where every test of a sentence passed, else how many did not."""
    found: list[Result] = []
    for pattern in claim.tests:
        tests = [result for result in results if re.match(pattern, f"{_file(result)}::{result.name}")]
        if not tests:
            raise ValueError(f"{claim.sentence!r} sums up {pattern}, which no test that was run matches.")
        found += tests
    failed = sum(result.outcome == "failed" for result in found)
    if failed:
        return f" **NOT SO: {failed} of {len(found)} tests of it fail.**"
    return "" if any(result.outcome == "passed" for result in found) else " (Skipped in this run.)"


def _lines(said: Mapping[Kind, list[str]]) -> str:
    return "\n".join(f"- **{kind}:** {sentence}" for kind in get_args(Kind) for sentence in said.get(kind, []))


def kinds(results: list[Result]) -> str:
    """Layer kinds by capabilities."""
    of_kind: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if re.search("test_kinds|test_export_of_kinds|test_compiled_kinds", result.where) and result.case:
            of_kind[re.sub(r"^(torch\.\w+-)|(-torch\.\w+)$", "", result.case)].append(result)
    names = [name for name, found in of_kind.items() if any("test_saved_and_loaded" in r.name for r in found)]

    def cell(name: str, works: str, refused: str | None) -> str:
        refusals = [r for r in of_kind[name] if refused and re.search(refused, r.name)]
        if refusals:
            return "refused" if verdict(refusals) == "yes" else "FAILS"
        return verdict([r for r in of_kind[name] if re.search(works, r.name)])

    rows = [[name, *(cell(name, *tests) for tests in CAPABILITIES.values())] for name in names]
    return table(["layer kind", *CAPABILITIES], rows)


def architectures(results: list[Result]) -> str:
    """One line for each outcome."""
    found = defaultdict(list)
    for result in results:
        if "test_architectures" in result.where:
            found[verdict([result]) or result.outcome].append(result.case)
    return "\n".join(f"- {outcome} ({len(names)}): {'; '.join(names)}" for outcome, names in found.items())


def behaviours(results: list[Result]) -> str:
    """What the life-cycle tests are named after."""
    found: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        if _file(result) in LIFE_CYCLE:
            found[_file(result), result.words].append(result)
    rows = [[words, f"{verdict(group)}{_times(group)}", file] for (file, words), group in found.items()]
    return table(["behaviour", "shown", "file"], rows)


def _times(group: list[Result]) -> str:
    return f", {len(group)} cases" if len(group) > 1 else ""


def refusals(results: list[Result]) -> str:
    """The sentences of errors that tests expect."""
    rows = {}
    for result in results:
        for name, value in result.properties:
            if name == "refused" and result.outcome == "passed":
                rows.setdefault(_general(value), [result.words, value])
    return table(["what", "the error"], rows.values())


def _general(sentence: str) -> str:
    """The same for messages that differ in the layer or the option they name."""
    return re.sub(r"\binner[.\w]*|\(\w+\)|'\w+'$", "", sentence)


def peft_suite(runs: list[tuple[dict[str, str], list[Result]]]) -> str:
    """In words and by file, for each version."""
    parts = []
    for about, results in runs:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for result in results:
            counts[_file(result)][result.outcome] += 1
        outcomes = ("passed", "failed", "xfailed", "skipped")
        total = sum(counts.values(), Counter())
        rows = [[file, *(str(count[outcome]) for outcome in outcomes)] for file, count in counts.items()]
        rows.append(["all", *(str(total[outcome]) for outcome in outcomes)])
        parts += [
            f"With {versions(about)}, {about['date']}:",
            _suite_in_words(total, results),
            table(["file", "passed", "failed", "expected to fail", "skipped"], rows),
        ]
    return "\n\n".join(parts)


def _suite_in_words(total: Counter[str], results: list[Result]) -> str:
    """Expected failures are what differs; skipped tests say nothing about this method, or nothing without the hub."""
    expected = Counter(result.reason for result in results if result.outcome == "xfailed")
    skipped = Counter(result.reason for result in results if result.outcome == "skipped")
    said: dict[Kind, list[str]] = {
        "Works": [f"{total['passed']} tests pass."],
        "Differs from LoRA": [f"{total['xfailed']} tests are expected to fail: {_counted(expected)}."],
        "Does not work": [f"{total['failed']} tests fail." if total["failed"] else "Nothing else fails."],
    }
    return f"{_lines(said)}\n- **Skipped by PEFT:** {total['skipped']} tests: {_counted(skipped)}."


def _counted(reasons: Counter[str]) -> str:
    return "; ".join(f"{count} ({reason.rstrip('.')})" for reason, count in reasons.most_common())


def borrowed(about: dict[str, str], results: list[Result]) -> str:
    """Why PEFT's tests for LoRA alone pass or cannot."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        counts[_file(result)].update(value for name, value in result.properties if name == "outcome")
    total = sum(counts.values(), Counter())
    columns = sorted(total, key=lambda outcome: (outcome != "passes", -total[outcome]))
    rows = [[file, *(str(count[column]) for column in columns)] for file, count in counts.items()]
    said: dict[Kind, list[str]] = {
        "Works": [f"{total['passes']} of {total.total()} tests pass with SORSA in LoRA's place."],
        "Does not work": ["The others: " + _counted(Counter({name: total[name] for name in columns[1:]})) + "."],
    }
    heading = f"With {versions(about)}, {about['date']}:"
    return "\n\n".join([heading, _lines(said), table(["file", *columns], rows)])


def _file(result: Result) -> str:
    return next(part for part in result.where.split(".") if part.startswith("test_"))


def main(own: str, *others: str) -> str:
    """The document."""
    about, results = read(own)
    runs = [read(path) for path in others]
    surveys = [run for run in runs if any(name == "outcome" for r in run[1] for name, _ in r.properties)]
    suites = [run for run in runs if run not in surveys]
    text = (Path(__file__).parent / "support_table.md").read_text()
    return text.format(
        versions=versions(about),
        date=about["date"],
        kinds=kinds(results),
        kinds_in_words=sentences(CLAIMS["kinds"], results),
        architectures=architectures(results),
        architectures_in_words=sentences(CLAIMS["architectures"], results),
        behaviours=behaviours(results),
        life_in_words=sentences(CLAIMS["life"], results),
        refusals=refusals(results),
        peft_suite=peft_suite(suites),
        borrowed="\n\n".join(borrowed(*survey) for survey in surveys),
    )


if __name__ == "__main__":
    print(main(*sys.argv[1:]), end="")
