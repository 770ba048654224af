"""`AdapterArguments`: the adapter's options as command-line arguments of an existing HfArgumentParser script."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AdapterArguments:
    """What `sorsa_plugin.setup_adapter` takes, for scripts in the style of transformers' run_clm.py:

        parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments, AdapterArguments))
        ...
        setup = setup_adapter(adapter_args)
        trainer = Trainer(model=setup.wrap(model), ...)
        setup.add_callbacks(trainer)

    Arguments left out keep the method's defaults.
    """

    adapter: str | None = field(
        default=None,
        metadata={"help": "Adapter type: sorsa, lora, pissa, dora, ..., full, or any method that PEFT registers."},
    )
    r: int | None = field(default=None, metadata={"help": "Rank."})
    alpha: int | None = field(default=None, metadata={"help": "Scale is alpha / r, for methods that have one."})
    dropout: float | None = field(default=None, metadata={"help": "Dropout probability on the adapter's input."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Module names, 'all-linear', or one regular expression."}
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Module names to leave out."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained in full and saved with the adapter."}
    )
    layers_to_transform: list[int] | None = field(default=None, metadata={"help": "Indices of the layers to adapt."})
    task_type: str | None = field(default=None, metadata={"help": "PEFT's task type: CAUSAL_LM, SEQ_CLS, ..."})
    adapter_options: str | None = field(
        default=None, metadata={"help": "The method's own options as JSON, such as '{\"gamma\": 4e-4}'."}
    )
