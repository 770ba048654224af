"""Turns prompt/completion and chat examples into token ids, with labels on what the model should say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

IGNORED = -100
"""The label that transformers' losses ignore."""

COLUMNS = (("prompt", "completion", ""), ("question", "answer", "\n"), ("instruction", "output", "\n"))
"""(prompt column, completion column, text between the two) as data sets name and separate them."""

MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag by which a chat template marks the assistant's words."""


def encode(example: Mapping[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Token ids and labels of one example; only the completion, or the assistant's turns, have labels.

    Args:
        example: {"messages": [{"role", "content"}, ...]}, or a prompt and a completion under one of `COLUMNS`.
        tokenizer: a transformers tokenizer; chat examples need its chat template.
        max_length: in tokens; longer examples are cut at the end.

    Returns:
        {"input_ids", "labels"}, two lists of equal length.

    Raises:
        ValueError: the example has none of these forms.
    """
    if "messages" in example:
        ids, labels = _encode_chat(example["messages"], tokenizer)
    else:
        for prompt, completion, between in COLUMNS:
            if prompt in example and completion in example:
                ids, labels = _encode_pair(example[prompt] + between, example[completion], tokenizer)
                break
        else:
            known = ", ".join(f"{prompt}/{completion}" for prompt, completion, _ in COLUMNS)
            raise ValueError(
                f"An example has the columns {', '.join(example) or 'none'}; expected messages, or one of {known}. "
                "Rename the columns of the data."
            )
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_all(examples: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """`encode` for a data set. Examples whose completion begins beyond max_length are left out.

    Raises:
        ValueError: an example has an unknown form, or nothing is left to train on.
    """
    encoded = [encode(example, tokenizer, max_length) for example in examples]
    kept = [item for item in encoded if any(label != IGNORED for label in item["labels"])]
    if not kept:
        raise ValueError(
            f"None of {len(encoded)} examples has a completion within {max_length} tokens. Raise the maximum length, "
            "or check the data."
        )
    return kept


def _encode_pair(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    asked = tokenizer(prompt)["input_ids"]
    said = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return asked + said, [IGNORED] * len(asked) + said


def _encode_chat(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    if MARKS_TURNS.search(tokenizer.chat_template or ""):
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return ids, [token if said else IGNORED for token, said in zip(ids, mask, strict=True)]
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    return ids, [IGNORED] * len(asked) + ids[len(asked) :]
