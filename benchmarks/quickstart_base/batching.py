"""Turns the corpus into batches of tokens for pre-training, after a first lesson in copying."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from . import corpus
from .architecture import Settings
from .corpus import Example

POOL = 4000
"""Examples drawn at a time, sorted by length so that a batch holds little padding."""

Row = tuple[list[int], int]
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Progress:
    """How far the training is; `error` is the smoothed loss of the answers."""

    step: int = 0
    seen: int = 0
    error: float = 0.0

    def copies(self) -> bool:
        """Whether the model has learned to copy from the context."""
        return self.step > 100 and self.error < 0.3

    def note(self, error: float, tokens: int) -> None:
        """Counts one step."""
        self.error = 0.95 * self.error + 0.05 * error if self.step else error
        self.step += 1
        self.seen += tokens


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example], bare: random.Random) -> list[Row]:
    """Token ids of every example with the length of its prompt; one in ten lacks the start token."""
    prompts = tokenizer([e.prompt for e in examples])["input_ids"]
    answers = tokenizer([e.completion for e in examples], add_special_tokens=False)["input_ids"]
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        start = 1 if bare.random() < 0.1 else 0
        rows.append((prompt[start:] + answer + [tokenizer.eos_token_id], len(prompt) - start))
    return rows


def recall_batch(rng: random.Random, settings: Settings, first: int) -> Batch:
    """Random tokens, then the same again: the densest lesson in copying from the context."""
    length = rng.randint(6, 24)
    rows = settings.tokens_per_batch // (2 * length)
    seen = torch.tensor([[rng.randrange(first, settings.vocab_size) for _ in range(length)] for _ in range(rows)])
    mark = torch.full((rows, 1), 1)
    weights = torch.zeros(rows, 2 * length + 2)
    weights[:, length + 3 :] = 1.0
    return torch.cat([mark, seen, mark + 1, seen], dim=1), weights


def batches(tokenizer: PreTrainedTokenizerFast, settings: Settings, progress: Progress) -> Iterator[Batch]:
    """An endless stream of (token ids, loss weights), each batch of examples of about the same length."""
    rng = random.Random(settings.seed)
    stream = corpus.generate(settings.seed)
    specials = len(tokenizer.all_special_ids)
    while not progress.copies():
        yield recall_batch(rng, settings, specials)
    while True:
        examples = list(itertools.islice(stream, POOL))
        rows = sorted(encode(tokenizer, examples, rng), key=lambda row: len(row[0]))
        groups: list[list[Row]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row[0]) > settings.tokens_per_batch:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            if rng.random() < settings.recall_share:
                yield recall_batch(rng, settings, specials)
            width = max(len(ids) for ids, _ in group)
            tokens = torch.full((len(group), width), tokenizer.pad_token_id)
            weights = torch.zeros(len(group), width)
            for place, (ids, prompt) in enumerate(group):
                tokens[place, : len(ids)] = torch.tensor(ids)
                weights[place, :prompt] = settings.prompt_weight
                weights[place, prompt : len(ids)] = 1.0
            yield tokens, weights
