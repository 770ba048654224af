"""`sorsa plan` counts, from the config alone, what a real model and its adapter take."""

from __future__ import annotations

import pytest
import torch
from builders.llama import tied_llama, tiny_llama
from builders.models import tiny_gpt2, tiny_mixtral
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, ConvNextConfig, ConvNextForImageClassification, LlamaConfig
from typer.testing import CliRunner

from sorsa_cli import build_app
from sorsa_plugin import SORSAConfig, plan
from sorsa_plugin.errors import BaseFilesError, RankError, SORSAConfigError
from sorsa_plugin.tools.layer_groups import LayerGroup
from sorsa_plugin.tools.training_memory import Memory, estimate_activations

CASES = {
    "dense": (tiny_llama, {"target_modules": "all-linear"}),
    "bfloat16": (
        lambda: tied_llama(torch.bfloat16),
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 5}},
    ),
    "experts": (tiny_mixtral, {"target_modules": "all-linear"}),
    "conv1d": (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "experts-adapted": (
        tiny_mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"down_proj": 5},
        },
    ),
    "embedding-and-head": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied-embedding": (
        lambda: tied_llama(torch.bfloat16),
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "tokens": (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "tokens-tied": (
        lambda: tied_llama(torch.bfloat16),
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ),
    "modules-to-save": (tiny_llama, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
}


def config(**options) -> SORSAConfig:
    return SORSAConfig(**{"r": 3, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **options})


def config_only(model, directory) -> None:
    """A directory with a config and no weights."""
    model.save_pretrained(directory)
    for path in directory.glob("model*"):
        path.unlink()


@pytest.mark.parametrize("case", CASES)
def test_parameters_bytes_and_memory_are_those_of_a_real_run(tmp_path, case):
    make, options = CASES[case]
    make().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config(**options))
    base_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "base").parameters())
    model.save_pretrained(tmp_path / "adapter")
    config_only(make(), tmp_path / "config")
    found = plan(tmp_path / "config", config(**options), unit_seconds=1.0)
    assert found.base_parameters == base_parameters
    assert found.trainable_parameters == model.get_nb_trainable_parameters()[0]
    assert found.adapter_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model(input_ids=torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss.backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    frozen_factors = [t for name, t in model.named_buffers() if ".sorsa_factors." in name]
    everything = [*model.parameters(), *model.buffers()]
    measured = Memory(
        weights=size(everything) - size(trained) - size(frozen_factors),
        frozen_factors=size(frozen_factors),
        trained=size(trained),
        gradients=size([parameter.grad for parameter in trained]),
        optimizer_state=size(moments),
        communication=0,
        activations=found.memory.activations,
    )
    assert found.memory == measured
    assert found.memory.total == sum(vars(measured).values())


@pytest.mark.parametrize("case", CASES)
def test_the_lora_beside_it_is_pefts(tmp_path, case):
    """Trained parameters and file of a real LoRA; its memory is that of a real step."""
    make, options = CASES[case]
    make().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = get_peft_model(base, LoraConfig(**{"r": 3, "task_type": "CAUSAL_LM", **options}))
    lora.save_pretrained(tmp_path / "adapter")
    config_only(make(), tmp_path / "config")
    found = plan(tmp_path / "config", config(**options), unit_seconds=1.0)
    assert found.lora is not None, found.lora_refusal
    assert found.lora.trainable_parameters == lora.get_nb_trainable_parameters()[0]
    assert found.lora.adapter_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size

    trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    lora(input_ids=torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss.backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert found.lora.memory == Memory(
        weights=size([*lora.parameters(), *lora.buffers()]) - size(trained),
        frozen_factors=0,
        trained=size(trained),
        gradients=size([parameter.grad for parameter in trained]),
        optimizer_state=size(moments),
        communication=0,
        activations=found.memory.activations,
    )


def test_a_lora_that_peft_refuses_is_a_sentence_beside_the_plan(tmp_path):
    settings = ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)
    config_only(ConvNextForImageClassification(settings), tmp_path)
    found = plan(tmp_path, config(r=3, task_type=None, target_modules=["dwconv"]), unit_seconds=1.0)
    assert found.lora is None
    assert "PEFT refuses these options" in found.lora_refusal
    assert "divisible" in found.lora_refusal


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_fused_experts_are_counted_as_not_adapted(tmp_path):
    model = tiny_mixtral()
    config_only(model, tmp_path)
    attention = config(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    found = plan(tmp_path, attention, unit_seconds=1.0)
    assert found.stacked_parameters == sum(p.numel() for p in model.parameters() if p.ndim == 3) > 0
    assert {group.kind for group in found.groups} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert plan(tmp_path, attention, unit_seconds=1.0).groups[0] == LayerGroup("q_proj", (32, 32), 3, 2)


def test_experts_that_are_named_are_counted_one_by_one(tmp_path):
    config_only(tiny_mixtral(), tmp_path)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    found = plan(tmp_path, config(target_modules=[], target_parameters=names), unit_seconds=1.0)
    assert found.stacked_parameters == 0
    assert set(found.groups) == {  # 2 blocks of 4 experts
        LayerGroup("gate_up_proj", (96, 32), 3, 8, lent=True),
        LayerGroup("down_proj", (32, 48), 3, 8, lent=True),
    }
    half = plan(tmp_path, config(target_modules=[], target_parameters=names[:1]), unit_seconds=1.0)
    assert half.stacked_parameters == 8 * 32 * 48
    unit = 4096**2
    assert found.init_seconds == pytest.approx(8 * (96 * 32 + 32 * 48) / unit)
    options = ["--target-modules", "", "--target-parameters", ",".join(names), "-r", "3", "--unit-seconds", "1"]
    run = CliRunner().invoke(build_app(), ["plan", "--model", str(tmp_path), *options])
    assert run.exit_code == 0, run.output
    assert "gate_up_proj" in run.output
    assert "not adapted" not in run.output


def test_changed_weights_that_experts_compute_with_are_part_of_the_activations(tmp_path):
    """What autograd keeps is at least those: one tensor of the weight's size for each adapted stack."""
    model = tiny_mixtral()
    config_only(model, tmp_path)
    # with q_proj, so that the experts' inputs need gradients, for which autograd keeps their weights
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    groups = plan(tmp_path, config(**options), unit_seconds=1.0).groups
    unlent = tuple(group for group in groups if not group.lent)
    estimates = [
        estimate_activations(model.config, case, torch.float32, 1, 8, checkpointing)
        for checkpointing in (False, True)
        for case in (groups, unlent)
    ]
    lent = sum(p.nbytes for name, p in model.named_parameters() if "gate_up_proj" in name)
    assert estimates[0] - estimates[1] == lent
    assert estimates[2] - estimates[3] == lent // 2  # of one of two blocks

    adapted = get_peft_model(model, config(**options))
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = adapted(torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss
    size_of_one = 4 * 96 * 32 * 4
    found = [s.nbytes() for pointer, s in kept.items() if pointer not in own and s.nbytes() >= size_of_one]
    assert loss.requires_grad
    assert sum(found) >= lent


def test_a_7b_model_needs_no_weights_and_no_memory(tmp_path):
    """Llama 2 7B, whose parameters are public: 6,738,415,616."""
    LlamaConfig(intermediate_size=11008, dtype="bfloat16").save_pretrained(tmp_path)
    found = plan(tmp_path, config(r=128), unit_seconds=1.0)
    assert found.base_parameters == 6_738_415_616
    # per block: four 4096 x 4096, and three 4096 x 11008; r (out + in + 1) each
    assert found.trainable_parameters == 32 * 128 * (4 * (4096 + 4096 + 1) + 3 * (4096 + 11008 + 1))
    assert found.memory.weights == pytest.approx(2 * found.base_parameters, rel=1e-6)  # and the rotary buffers
    more = found.memory.total - found.lora.memory.total
    assert round(more / 2**30, 2) == 1.20, "docs/planning.md says so"


def test_a_model_is_really_timed(tmp_path):
    config_only(tiny_llama(), tmp_path)
    assert 0 < plan(tmp_path, config()).init_seconds < 60


def test_processes_share_the_factorisations(tmp_path):
    config_only(tiny_llama(), tmp_path)
    alone, four = (plan(tmp_path, config(), gpus=gpus, unit_seconds=1.0) for gpus in (1, 4))
    assert four.init_seconds == pytest.approx(alone.init_seconds / 4)
    assert four.init_basis == f"{alone.init_basis}; shared by 4 processes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fsdp"}, "engine is 'fsdp'; expected one of 'ddp', 'fsdp2', 'zero3'"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; expected one of"),
        ({"gpus": 0}, "gpus is 0; expected an integer from 1 to"),
        ({"batch": -1}, "batch is -1"),
        ({"unit_seconds": 0.0}, "unit_seconds is 0.0"),
    ],
)
def test_impossible_options_are_sentences(tmp_path, options, message):
    with pytest.raises(SORSAConfigError, match=message):
        plan(tmp_path, config(), **options)


def test_impossible_adapters_and_models_are_sentences(tmp_path):
    with pytest.raises(BaseFilesError, match="gives no model config"):
        plan(tmp_path, config())
    config_only(tiny_llama(), tmp_path)
    with pytest.raises(RankError):
        plan(tmp_path, config(rank_pattern={"q_proj": 100}), unit_seconds=1.0)
    with pytest.raises(SORSAConfigError, match="nope"):
        plan(tmp_path, config(target_modules=["nope"]), unit_seconds=1.0)
