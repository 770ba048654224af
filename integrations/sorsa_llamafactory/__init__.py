"""SORSA in LLaMA-Factory: `sorsa llamafactory train recipe.yaml`, with `finetuning_type: sorsa` in the recipe."""
