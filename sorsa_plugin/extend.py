"""The one page that a plug-in imports from: how to add a layer kind, an adapter word, callbacks, an engine, a command.

A plug-in is a module that implements some of the hooks below, each marked with `@hookimpl`. Its package names it under
the entry-point group "sorsa_plugin":

    [project.entry-points.sorsa_plugin]
    my_plugin = "my_package.plugin"

`sorsa doctor` lists the plug-ins that were found, with a traceback for each that could not be loaded. This package's
own integrations are plug-ins like any other, and import from this page alone. What is listed here stays; every other
module may change.

**A layer kind**: `sorsa_layer(target, config)` returns the class for a base module that it knows, else None. Derive it
from `AdditiveLayer`, and say how the weight reads as a matrix W (out x in) and what the change adds to the output:

    class MyLayer(AdditiveLayer):
        parameter_name = "kernel"                       # the adapted attribute; default: "weight"

        def base_matrix(self):                          # (out x in), a view of the stored weight
            return self.get_base_layer().kernel.T

        def delta_to_weight(self, delta):               # (out x in) -> the stored shape
            return delta.T

        def add_change(self, y, x, adapter_name):       # y (... x out) + change of x (... x in)
            return add_low_rank(y, self.sorsa_dropout[adapter_name](x), self.ready_factors(adapter_name).parts())

`LendingLayer` needs only the first two methods: its base module reads its weight by itself, and is lent the changed
one. `SORSAQuantisedLinear` says how to read a weight stored in few bits (`dequantise`) and how to write it
(`quantise`). A kind for a linear module has "Linear" in its name, by which PEFT's "all-linear" recognises adapted
layers. If PEFT's LoRA has no such layer, `lora_layout` returns ("unsupported", "what it is").

**A word for `adapter:`**: `sorsa_adapters()` returns `AdapterType`s: the word, a sentence, and a function from
`AdapterOptions` to an `AdapterSetup`. `build_config` makes a PEFT config of a recipe's words, and refuses words that
the config does not have.

**Callbacks**: `sorsa_callbacks(peft_config)` returns the Trainer callbacks that training with this config needs.

**An engine**: `sorsa_engine(factors, optimizer)` returns an `Engine` if it keeps the factors, else None. An engine says
which part of each factor P = initial + offset this process steps, and where its gradient is:

    class MyEngine(Engine):
        owns_parameters = False                         # it steps masters of the adapter's own parameters

        def owns(self, factor):
            return factor.offset in self.flat

        def shares(self, factors):                      # alike on every process, in order; a share may be empty
            return [self.share(factor) for factor in factors]

        def share(self, factor):
            initial = factor.initial[self.rows]
            return Share(factor.name, initial, my_master(factor), my_gradient(factor), rank, group, (process_group,))

The regularizer then costs one all-reduce of r x r matrices a step. `sorsa_frozen_as_parameters()` says how frozen
factors survive under the engine. `sorsa_gather(parameters)` is a context in which partitioned weights are whole.

**A command**: a function that adds to the typer app of `sorsa`, under an entry-point group of its own:

    [project.entry-points.sorsa_commands]
    my_plugin = "my_package.commands:add_commands"

`sorsa --help` calls it, so its module imports typer and `sorsa_cli.options`, the arguments that commands share, and no
more; a command imports what it needs when it runs.

A whole package with a layer kind, an adapter word and a command is in examples/third_party_plugin.
"""

from __future__ import annotations

from sorsa_cli import options
from sorsa_cli.formatting import console, size

from .config import RegSchedule, RegUpdate, SORSAConfig
from .errors import nearest
from .files.adapter_format import FROZEN, OFFSETS
from .files.atomic_directory import appearing_whole, output_path, refuse_occupied
from .files.run_checkpoints import checkpoints, is_complete
from .files.saved_adapter import open_tensors, read_config, survey
from .layers.factors import ROUNDED, SORSAFactors
from .layers.frozen_placement import frozen_as_parameters
from .layers.kinds.additive import AdditiveLayer
from .layers.kinds.lending import LendingLayer
from .layers.kinds.linear import SORSALinear
from .layers.kinds.quantised import SORSAQuantisedLinear
from .layers.layer import SORSALayer, sorsa_layers
from .linalg.offset_form import add_low_rank
from .linalg.svd import SvdMethod
from .model_card import complete_model_card, public_name
from .plugins import hookimpl
from .rank_zero import say
from .recipes.adapter_type import AdapterOptions, AdapterSetup, AdapterType, build_config
from .recipes.peft_methods import LORA_NAMES, steps_placeholder
from .recipes.setup_adapter import SPELLINGS, VARIANTS, VOCABULARY, block_names, block_note, read_options, setup_adapter
from .recipes.yaml_values import yaml_values
from .regularizer.attach import attach
from .regularizer.engines import Engine, Share, WholeFactors
from .regularizer.optimizers import groups_by_parameter, innermost
from .regularizer.step_hooks import Attachment, attachment_of
from .regularizer.trained_factors import Factor, model_factors, trained_adapters
from .tools.analysis.charts import require_matplotlib

__all__ = [
    "FROZEN",
    "LORA_NAMES",
    "OFFSETS",
    "ROUNDED",
    "SPELLINGS",
    "VARIANTS",
    "VOCABULARY",
    "AdapterOptions",
    "AdapterSetup",
    "AdapterType",
    "AdditiveLayer",
    "Attachment",
    "Engine",
    "Factor",
    "LendingLayer",
    "RegSchedule",
    "RegUpdate",
    "SORSAConfig",
    "SORSAFactors",
    "SORSALayer",
    "SORSALinear",
    "SORSAQuantisedLinear",
    "Share",
    "SvdMethod",
    "WholeFactors",
    "add_low_rank",
    "appearing_whole",
    "attach",
    "attachment_of",
    "block_names",
    "block_note",
    "build_config",
    "checkpoints",
    "complete_model_card",
    "console",
    "frozen_as_parameters",
    "groups_by_parameter",
    "hookimpl",
    "innermost",
    "is_complete",
    "model_factors",
    "nearest",
    "open_tensors",
    "options",
    "output_path",
    "public_name",
    "read_config",
    "read_options",
    "refuse_occupied",
    "require_matplotlib",
    "say",
    "setup_adapter",
    "size",
    "sorsa_layers",
    "steps_placeholder",
    "survey",
    "trained_adapters",
    "yaml_values",
]
