"""What is quantised in another way, or not yet, is refused with a sentence; what is not quantised is no plug-in's."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from builders.one_layer import OneLayer, adapt, inputs
from builders.quantised import IN, OUT, quantised_base
from torch import nn

from sorsa_plugin import merge_and_dequantize
from sorsa_plugin.errors import UnsupportedLayerError
from sorsa_plugin.layers.storage import is_quantised

bitsandbytes = pytest.importorskip("bitsandbytes")


def with_8_bit_activations() -> nn.Module:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(IN, OUT))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model[0]


def of_4_bit_integers() -> nn.Module:
    """torchao's for CPUs: it cannot be read back, and its product has no gradient."""
    int4 = pytest.importorskip("torchao.prototype.quantization.int4")
    from torchao.quantization import quantize_

    model = nn.Sequential(nn.Linear(IN, OUT))
    quantize_(model, int4.PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False))
    return model[0]


def of_8_bit_floats() -> nn.Module:
    layer = nn.Linear(IN, OUT)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def not_quantised_yet() -> nn.Module:
    return bitsandbytes.nn.Linear4bit(IN, OUT)


def with_trained_weights() -> nn.Module:
    return bitsandbytes.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True)


@pytest.mark.parametrize(
    "make",
    [with_8_bit_activations, of_4_bit_integers, of_8_bit_floats, not_quantised_yet, with_trained_weights],
    ids=lambda make: make.__name__,
)
def test_other_quantised_linears_are_refused_by_name(make: Any) -> None:
    layer = make()
    assert is_quantised(layer)
    sentence = rf"proj of type {type(layer).__name__} is quantised in a way that SORSA cannot adapt; bitsandbytes'"
    with pytest.raises(UnsupportedLayerError, match=sentence):
        adapt(OneLayer(layer))


def an_embedding() -> nn.Module:
    layer = bitsandbytes.nn.EmbeddingNF4(OUT, IN)
    layer.load_state_dict(nn.Embedding(OUT, IN).state_dict())
    return layer.to("cpu")


def by_torchao(layer: nn.Module) -> nn.Module:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(layer)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: module is layer)
    return model[0]


@pytest.mark.parametrize(
    "make",
    [an_embedding, lambda: by_torchao(nn.Embedding(OUT, IN)), lambda: by_torchao(nn.Conv2d(32, 32, 3))],
    ids=["nf4 embedding", "torchao embedding", "torchao convolution"],
)
def test_other_quantised_modules_are_refused_by_name_and_not_dequantised(make: Any) -> None:
    layer = make()
    with pytest.raises(UnsupportedLayerError, match=rf"{type(layer).__name__} is quantised in a way that SORSA cannot"):
        adapt(OneLayer(layer), r=1)
    base = quantised_base("nf4")
    base.add_module("other", layer)
    with pytest.raises(UnsupportedLayerError, match=r"other of type .* no plug-in can read"):
        merge_and_dequantize(adapt(base))


def test_a_plain_embedding_of_bitsandbytes_is_no_obstacle() -> None:
    base = quantised_base("nf4")
    base.add_module("other", bitsandbytes.nn.StableEmbedding(OUT, IN))
    plain = merge_and_dequantize(adapt(base, target_modules=["proj", "other"]))
    assert type(plain.other) is bitsandbytes.nn.StableEmbedding


def test_a_linear_of_another_library_is_refused_whatever_it_stores() -> None:
    """GPTQ, AWQ and HQQ keep their weights under other names and are no nn.Linear; quanto's are."""
    foreign = type("QLinear", (nn.Linear,), {"__module__": "optimum.quanto.nn.qlinear"})
    with pytest.raises(UnsupportedLayerError, match="QLinear is quantised"):
        adapt(OneLayer(foreign(IN, OUT)))
    packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(UnsupportedLayerError, match="Module is quantised"):
        adapt(OneLayer(packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_plain_linear_is_not_quantised(dtype: torch.dtype) -> None:
    assert not is_quantised(nn.Linear(4, 4).to(dtype))


def test_a_weight_that_bitsandbytes_has_packed_for_inference_is_refused() -> None:
    base = quantised_base("nf4").eval()
    if not base.proj.support_avx512bf16_for_cpu and not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("bitsandbytes packs only on CPUs with AVX512-BF16")
    base.proj.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        base(inputs(IN))
    with pytest.raises(UnsupportedLayerError, match="packed the weight of proj for inference on this CPU"):
        adapt(base)


def test_no_quantisation_library_is_imported_for_a_model_without_one() -> None:
    """PEFT and transformers import them where they are installed; without them, our plug-ins ask for nothing."""
    code = (
        "import sys; sys.modules['bitsandbytes'] = sys.modules['torchao'] = None\n"
        "import torch, sorsa_plugin; from peft import get_peft_model\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "get_peft_model(model, sorsa_plugin.SORSAConfig(r=2, target_modules=['0']))\n"
        "from sorsa_plugin.plugins import broken; assert not broken, broken; print('adapted')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["adapted"], run.stderr
