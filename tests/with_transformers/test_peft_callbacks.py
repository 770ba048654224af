"""EVA and AdaLoRA through `setup_adapter` are the methods they are named after, not LoRA in disguise."""

from __future__ import annotations

import copy

import pytest
import torch
from builders.llama import tiny_llama, token_batches
from peft import get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

from sorsa_plugin import setup_adapter
from sorsa_plugin.errors import AdapterOptionsError


def arguments(directory, **changes):
    options = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    return TrainingArguments(str(directory), **options | changes)


def train(setup, directory, data, **changes):
    model = setup.wrap(tiny_llama())
    trainer = Trainer(model, arguments(directory, **changes), train_dataset=data)
    setup.add_callbacks(trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_starts_from_the_activations_and_trains_what_it_started(rho, tmp_path):
    """After a step at rate zero the tensors are those of PEFT's own call on the same batches."""
    data = token_batches(8)  # every batch is all of it: EVA sees the same rows in whatever order
    options = {"adapter": "eva", "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "eva": {"rho": rho}}
    setup = setup_adapter(options)
    batch = {"per_device_train_batch_size": 8}
    trainer = train(setup, tmp_path / "a", data, learning_rate=0.0, max_steps=1, **batch)

    reference = get_peft_model(tiny_llama(), setup_adapter(options).peft_config)
    reference.eval()
    initialize_lora_eva_weights(reference, trainer.get_train_dataloader(), show_progress_bar=False)
    expected = {name: tensor for name, tensor in reference.state_dict().items() if "lora_A" in name}
    found = trainer.model.state_dict()
    assert expected
    ranks = {tensor.shape[0] for tensor in expected.values()}
    assert ranks == {4} if rho == 1.0 else len(ranks) > 1  # EVA redistributed
    for name, tensor in expected.items():
        # singular vectors of the same rows in another order: equal up to sign and the rounding of an SVD whose
        # smallest gap is about 1e-2 of its norm
        assert tensor.shape == found[name].shape, name
        assert torch.allclose((tensor * found[name]).sum(1).abs(), torch.ones(len(tensor)), atol=1e-4), name

    before = copy.deepcopy(found)
    trained = train(setup_adapter(options), tmp_path / "b", data, **batch)
    stepped = {id(p) for group in trained.optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in trained.model.named_parameters() if p.requires_grad}
    assert stepped == {id(p) for p in trainable.values()}
    assert all(p.abs().max() > 0 for name, p in trainable.items() if "lora_B" in name)
    assert before.keys() == trained.model.state_dict().keys()


def test_eva_does_not_start_anew_on_resume(tmp_path):
    options = {"adapter": "eva", "r": 4, "target_modules": ["q_proj"], "eva": {"rho": 1.0}}
    data = token_batches(64)
    whole = train(setup_adapter(options), tmp_path / "a", data, max_steps=4)
    first = train(setup_adapter(options), tmp_path / "b", data, max_steps=4, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "b" / "checkpoint-2"
    setup = setup_adapter(options)
    trainer = Trainer(setup.wrap(tiny_llama()), arguments(tmp_path / "b", max_steps=4), train_dataset=data)
    setup.add_callbacks(trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for (name, a), (_, b), (_, c) in zip(
        whole.model.named_parameters(), first.model.named_parameters(), trainer.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert torch.equal(a, c), name


def test_adalora_prunes_to_its_target(tmp_path):
    """PEFT's own loop as the reference: the same ranks survive."""
    data = token_batches(64)
    options = {
        "adapter": "adalora",
        "r": 2,
        "target_modules": ["q_proj", "v_proj"],
        "adalora": {"init_r": 4, "tinit": 1, "tfinal": 2, "deltaT": 1},
    }
    trainer = train(setup_adapter(options), tmp_path, data, max_steps=12)
    config = trainer.model.peft_config["default"]
    assert config.total_step == 12  # the trainer's number replaced the placeholder
    kept = {name: sum(mask) for name, mask in config.rank_pattern.items()}
    assert len(kept) == 4
    assert sum(kept.values()) == 2 * 4  # target_r on average
    pruned = [p for name, p in trainer.model.named_parameters() if "lora_E" in name]
    assert sum(int((p != 0).sum()) for p in pruned) == 8

    model = get_peft_model(
        tiny_llama(), setup_adapter(options | {"adalora": options["adalora"] | {"total_step": 12}}).peft_config
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 12)
    model.train()
    loader = trainer.get_train_dataloader()
    batches = [batch for _ in range(2) for batch in DataLoader(data, 4, collate_fn=default_data_collator)]
    assert len(loader) == 16
    for step, batch in enumerate(batches[:12]):
        model(**batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        schedule.step()
        optimizer.zero_grad()
    reference = {name: sum(mask) for name, mask in model.peft_config["default"].rank_pattern.items()}
    assert sum(reference.values()) == sum(kept.values())


def test_adalora_without_a_step_for_pruning_is_a_sentence(tmp_path):
    setup = setup_adapter({"adapter": "adalora", "target_modules": ["q_proj"], "adalora": {"tinit": 4, "tfinal": 4}})
    with pytest.raises(AdapterOptionsError, match="tinit 4 and tfinal 4 leave none of 6 steps for pruning"):
        train(setup, tmp_path, token_batches(32))


def test_sorsas_metrics_reach_the_log_history_through_the_setup(tmp_path):
    setup = setup_adapter({"adapter": "sorsa", "r": 4, "target_modules": ["q_proj"]})
    trainer = train(setup, tmp_path, token_batches(32), logging_steps=1, max_steps=2)
    assert len([entry for entry in trainer.state.log_history if "sorsa/gap_mean" in entry]) == 2
