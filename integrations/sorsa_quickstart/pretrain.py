"""Trains the quickstart base model from nothing on one CPU core and writes it with its measured skills.

Run it as `python -m sorsa_quickstart.pretrain --out DIR --minutes 40 --seed 0`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sorsa_quickstart import corpus
from sorsa_quickstart.corpus import Example
from sorsa_quickstart.tokenizer import build_tokenizer

POOL = 4000
"""Examples drawn at a time, sorted by length so that a batch holds little padding."""


Row = tuple[list[int], int]
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out, besides the time allowed."""

    seed: int = 0
    vocab_size: int = 768
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 384
    tokens_per_batch: int = 2000
    peak_rate: float = 3e-3
    matrix_rate: float = 0.02
    prompt_weight: float = 0.03
    recall_share: float = 0.04


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


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama with freshly drawn weights."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    start_looking_back(model, heads=2)
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 64
    return model


@torch.no_grad()
def start_looking_back(model: LlamaForCausalLM, heads: int) -> None:
    """Lets head n of the first layer attend to the token n + 1 places back from the start.

    Copying from the context is built on such heads, and a small model spends most of a short training on finding
    them. Every embedding gets the same constant part; queries and keys read it, and a rotary turn by the distance
    makes their product largest there. Nothing keeps the heads so: they are trained like all others.
    """
    attention, table = model.model.layers[0].self_attn, model.model.embed_tokens.weight
    size, width = attention.head_dim, table.shape[1]
    constant = torch.where(torch.rand(width) < 0.5, -1.0, 1.0)
    table.add_(table.std() * constant)
    turns = 10000.0 ** (-torch.arange(0, size, 2) / size)
    weight = torch.where(turns > 0.1, 1.0, 0.3)
    for head in range(heads):
        query = torch.cat([weight, torch.zeros(size // 2)])
        key = torch.cat([weight * torch.cos((head + 1) * turns), weight * torch.sin((head + 1) * turns)])
        rows = slice(head * size, (head + 1) * size)
        for linear, direction in ((attention.q_proj, query), (attention.k_proj, key)):
            linear.weight[rows].mul_(0.1).add_(7.5 * 2**0.5 / width * torch.outer(direction, constant))


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


def losses(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Weighted next-token cross entropy, and the plain one of the answers."""
    tokens, weights = batch
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens).logits[:, :-1]
    targets = tokens[:, 1:].flatten()
    each = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
    weight = weights[:, 1:].flatten()
    answers = weight == 1.0
    return (each * weight).sum() / weight.sum(), each.detach()[answers].mean().item()


def rate_at(done: float) -> float:
    """The share of the peak rate when a fraction of the time is over: a short warm-up, then a cosine."""
    return min(1.0, done / 0.02) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@torch.no_grad()
def answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], batch: int = 100
) -> list[str]:
    """Greedy completions of prompts."""
    model.eval()
    texts: list[str] = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        inputs = tokenizer(some, return_tensors="pt", padding=True, padding_side="left")
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=64)
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    return texts


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, float]:
    """Share of held-out questions whose whole answer is right, for every skill."""
    shares = {}
    for skill in corpus.SKILLS:
        examples = list(itertools.islice(corpus.generate(12345, held_out=True, only=skill), count))
        said = answer(model, tokenizer, [e.prompt for e in examples])
        right = [s.strip() == e.completion.strip() for s, e in zip(said, examples, strict=True)]
        shares[skill] = sum(right) / count
    return shares


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the model in bfloat16 and the tokenizer, replacing the folder in one go."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for file in part.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def build_optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learns to look up much sooner, and AdamW for the rest."""
    inside = {id(p) for p in model.model.layers.parameters() if p.dim() == 2}
    matrices = [p for p in model.parameters() if id(p) in inside]
    others = [p for p in model.parameters() if id(p) not in inside]
    inner = {"params": matrices, "peak": settings.matrix_rate}
    outer = {"params": others, "peak": settings.peak_rate}
    return [
        torch.optim.Muon([inner], weight_decay=0.05),
        torch.optim.AdamW([outer], betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(settings: Settings, minutes: float, out: Path, save_every: float) -> None:
    """Trains for some minutes, saving now and then, and writes the measured result with its model card."""
    texts = [e.prompt + e.completion for e in itertools.islice(corpus.generate(settings.seed), 30000)]
    tokenizer = build_tokenizer(texts, settings.vocab_size)
    model = build_model(settings, tokenizer)
    optimizers = build_optimizers(model, settings)
    print(f"The model has {model.num_parameters()} parameters and {len(tokenizer)} tokens.", flush=True)
    begin = saved = told = time.monotonic()
    progress = Progress()
    for batch in batches(tokenizer, settings, progress):
        now = time.monotonic()
        done = (now - begin) / (60 * minutes)
        if done >= 1:
            break
        loss, error = losses(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_at(done)
            optimizer.step()
            optimizer.zero_grad()
        progress.note(error, batch[0].numel())
        if now - told > 20:
            told = now
            print(f"{(now - begin) / 60:.1f} minutes: {progress}", flush=True)
        if now - saved > 60 * save_every:
            saved = now
            save(model, tokenizer, out)
            print(json.dumps(measure(model, tokenizer, 50)), flush=True)
    save(model, tokenizer, out)
    stored = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    shares = measure(stored, tokenizer, 500)
    print(json.dumps(shares), flush=True)
    (out / "README.md").write_text(card(settings, shares, progress, minutes, stored.num_parameters()))


def card(settings: Settings, shares: dict[str, float], progress: Progress, minutes: float, size: int) -> str:
    """The model card."""
    rows = "\n".join(f"| {skill} | {share:.1%} |" for skill, share in shares.items())
    return f"""---
license: apache-2.0
language: en
tags: [synthetic, tiny, test-model]
---

# Quickstart base model

A tiny Llama ({size} parameters) for trying out fine-tuning methods in a minute on a CPU. **It is not a
language model**: it was trained on generated text only (`sorsa_quickstart/corpus.py`), short questions about a
few numbers and words, and knows nothing else. It was trained from nothing; no other model's weights and no
collected text are in it. Licence: Apache-2.0.

Made with `python -m sorsa_quickstart.pretrain --minutes {minutes:g} --seed {settings.seed}` on one CPU core:
{progress.step} steps, {progress.seen} tokens, {settings.layers} layers of width {settings.hidden}, a vocabulary
of {settings.vocab_size} (byte-level, one token a digit). The run is limited by time, so another machine takes
another number of steps and gets other weights. The weights are stored in bfloat16.

Held-out questions whose whole answer is right (500 a skill, greedy, the stored weights loaded as float32):

| skill | right |
| --- | --- |
{rows}
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it is replaced")
    parser.add_argument("--minutes", type=float, default=40.0, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=10.0, help="minutes between saves")
    for name, kind in (
        ("layers", int),
        ("hidden", int),
        ("inner", int),
        ("heads", int),
        ("peak-rate", float),
        ("matrix-rate", float),
        ("tokens-per-batch", int),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Settings, name.replace("-", "_")))
    args = parser.parse_args()
    if args.minutes <= 0:
        raise SystemExit("The training time in minutes must be above zero.")
    torch.set_num_threads(1)
    settings = Settings(
        seed=args.seed,
        layers=args.layers,
        hidden=args.hidden,
        inner=args.inner,
        heads=args.heads,
        peak_rate=args.peak_rate,
        matrix_rate=args.matrix_rate,
        tokens_per_batch=args.tokens_per_batch,
    )
    train(settings, args.minutes, args.out, args.save_every)


if __name__ == "__main__":
    main()
