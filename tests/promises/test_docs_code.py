"""The code of the documentation runs as it stands: page by page, block by block, in the directory of a reader.

A block that cannot run here says why in a comment above it, `<!-- not run here: ... -->`, and is counted below.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders.adapters import perturb
from builders.documents import PAGES, SHOWN, Block, blocks, commands, indented_code, sides
from builders.models import tiny_mixtral
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from pydantic import create_model
from torch.distributed import checkpoint as dcp
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from typer.testing import CliRunner

from sorsa_axolotl.args import SORSAArgs
from sorsa_cli import build_app
from sorsa_distributed.sharded_checkpoints import complete_sharded_checkpoint
from sorsa_llamafactory.recipe import translated
from sorsa_plugin import SORSAConfig, setup_adapter
from sorsa_quickstart.answering import BASE, load_base
from sorsa_quickstart.task import train_examples
from sorsa_transformers.data import encode_all

MARKED = {"README.md": 2, "axolotl.md": 2, "distributed.md": 2, "llamafactory.md": 2, "serving.md": 3}
"""{page: number of its blocks that are not run here}, all of them with a reason."""

SLOW = ("analysis.md",)
"""Pages that take more than five seconds."""

# -- what a reader has ------------------------------------------------------------------------------------------------


def base(place: Path) -> None:
    place.symlink_to(BASE)


def mixture_of_experts(place: Path) -> None:
    tiny_mixtral().save_pretrained(place)


def fully_tuned(place: Path) -> None:
    model = load_base()[0]
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.1)
    model.save_pretrained(place)


def adapter(place: Path) -> None:
    model = get_peft_model(load_base()[0], config(SORSAConfig))
    perturb(model)
    model.save_pretrained(place)


def run_of(kind: Callable[..., PeftConfig]) -> Callable[[Path], None]:
    def train(place: Path) -> None:
        model, tokenizer = load_base()
        arguments = TrainingArguments(
            str(place), max_steps=2, save_steps=1, learning_rate=1e-3, report_to="none", use_cpu=True
        )
        collator = DataCollatorForSeq2Seq(tokenizer)
        Trainer(get_peft_model(model, config(kind)), arguments, train_dataset=data(), data_collator=collator).train()

    return train


def sharded_checkpoint(place: Path) -> None:
    """As accelerate writes it for FSDP2 with SHARDED_STATE_DICT."""
    model = get_peft_model(load_base()[0], config(SORSAConfig))
    dcp.save({"model": get_peft_model_state_dict(model)}, checkpoint_id=place / "pytorch_model_fsdp_0", no_dist=True)
    complete_sharded_checkpoint(place, model)


PLACES: dict[str, dict[str, Callable[[Path], None]]] = {
    "analysis.md": {
        "path/to/base": base,
        "runs/sorsa": run_of(SORSAConfig),
        "runs/lora": run_of(LoraConfig),
        "adapters/a": adapter,
        "models/fully-tuned": fully_tuned,
    },
    "distributed.md": {"runs/out/checkpoint-500": sharded_checkpoint},
    "hyperparameters.md": {"path/to/model": base},
    "planning.md": {
        "meta-llama/Llama-2-7b-hf": base,
        "path/to/70b": base,
        "path/to/base": base,
        "path/to/model": base,
        "path/to/moe": mixture_of_experts,
    },
    "quantization.md": {"path/or/id": base},
    "serving.md": {"path/to/base": base, "runs/adapter": adapter},
}
"""{page: {path that it names: what makes it}}; whatever the name, the model is the embedded one, or as tiny."""


def config(kind: Callable[..., PeftConfig]) -> PeftConfig:
    return kind(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@cache
def data() -> list[dict[str, list[int]]]:
    return encode_all(train_examples(8), load_base()[1], max_length=64)


def names() -> dict[str, object]:
    """The names that a page may use without making them: what every reader has."""
    model, tokenizer = load_base()
    return {
        "__name__": "page",
        "model": model,
        "tokenizer": tokenizer,
        "data": data(),
        "dataset": Dataset.from_list(train_examples(8)),
        "collator": DataCollatorForSeq2Seq(tokenizer),
    }


# -- how a block is run -----------------------------------------------------------------------------------------------


def require_axolotl_recipe(recipe: dict) -> None:
    """By Axolotl's schema as far as it is ours; its own keys are taken as they are."""
    others = {key: (Any, None) for key in recipe if key not in SORSAArgs.model_fields}
    create_model("Recipe", __base__=SORSAArgs, **others).model_validate(recipe)


def require_trl_recipe(recipe: dict) -> None:
    from sorsa_trl.recipe import RecipeParser

    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    parsed = RecipeParser("sft").parse(["--config", "recipe.yaml", "--use_cpu", "true"])
    assert setup_adapter(parsed.adapter).peft_config is not None


def require_llamafactory_recipe(recipe: dict) -> None:
    """By our reading of it; a recipe for LoRA too, which the page's first block compares."""
    assert translated(recipe).arguments["finetuning_type"] == "lora"


RECIPES = {"axolotl.md": require_axolotl_recipe, "llamafactory.md": require_llamafactory_recipe}
"""{page: what reads its recipes}; those of the other pages are for `sorsa sft`."""


def run_python(block: Block, namespace: dict[str, object], _: dict) -> None:
    exec(compile("\n" * block.line + block.code, block.page, "exec"), namespace)


def run_shell(block: Block, _: dict[str, object], __: dict) -> None:
    for program, *arguments in commands(block):
        assert program == "sorsa", f"{block} runs {program}; mark the block with a reason"
        done = CliRunner().invoke(build_app(), arguments)
        assert done.exit_code == 0, f"{block}, sorsa {' '.join(arguments)}: {done.output}{done.exception!r}"


def check_yaml(block: Block, _: dict[str, object], recipe: dict) -> None:
    """A block adds to the recipe of its page, or changes it."""
    for text in sides(block) if block.language == "diff" else [block.code]:
        content = yaml.safe_load(text)
        assert isinstance(content, dict)
        recipe |= content
        RECIPES.get(block.page, require_trl_recipe)(recipe)


RUN = {"python": run_python, "bash": run_shell, "yaml": check_yaml, "diff": check_yaml}


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in PAGES if blocks(page)]
)
def test_the_code_of_a_page_runs_in_its_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place, make in PLACES.get(page, {}).items():
        os.makedirs(os.path.dirname(place), exist_ok=True)
        make(Path(place))
    namespace, recipe = names(), {}
    for block in blocks(page):
        if block.language not in SHOWN and block.why_not is None:
            RUN[block.language](block, namespace, recipe)


# -- what keeps it true -----------------------------------------------------------------------------------------------


def test_every_block_names_its_language() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    assert [str(block) for block in found if block.language not in (*RUN, *SHOWN)] == []
    assert {page: lines for page in PAGES if (lines := indented_code(page))} == {}


def test_blocks_that_are_not_run_are_counted() -> None:
    marked = {page: sum(block.why_not is not None for block in blocks(page)) for page in PAGES}
    assert {page: count for page, count in marked.items() if count} == MARKED
    texts = (path.read_text(encoding="utf-8") for path in PAGES.values())
    assert sum(text.count("<!-- not run") for text in texts) == sum(MARKED.values()), "a mark stands above no block"
