"""Trains the quickstart base model from nothing on one CPU core and writes it with its measured skills.

Run it in benchmarks/ as `python -m quickstart_base.pretrain --out DIR --minutes 40 --seed 0`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from . import corpus
from .architecture import Settings, build_model, build_optimizers, save
from .batching import Batch, Progress, batches
from .tokenizer import build_tokenizer


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
language model**: it was trained on generated text only (`benchmarks/quickstart_base/corpus.py`), short questions
about a few numbers and words, and knows nothing else. It was trained from nothing; no other model's weights and no
collected text are in it. Licence: Apache-2.0.

Made in benchmarks/ with `python -m quickstart_base.pretrain --minutes {minutes:g} --seed {settings.seed}` on one
shared CPU core: {progress.step} steps, {progress.seen} tokens, {settings.layers} layers of width {settings.hidden}, a
vocabulary of {settings.vocab_size} (byte-level, one token a digit), Muon for the layers' matrices and AdamW for the
rest. The run is limited by time, so another machine takes another number of steps and gets other weights. The weights
are stored in bfloat16. The words of the fine-tuning task (`sorsa_quickstart/task.py`) are not in the corpus.

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
