"""Scripts that never import this package, each in a process of its own. Run as a program; prints {script: result}.

    python scripts.py BASE ADAPTER

Torch and transformers are imported once, as `import torch` finds them installed. Each script is then a fork, which
imports PEFT by itself: a start of Python for each would take most of the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, pipeline

BASE, ADAPTER = sys.argv[1:]
TOKENS = torch.tensor([[5, 9, 3, 17, 2, 40]])

Model = Callable[[torch.Tensor], Any]


def is_known() -> list[bool]:
    """Whether PEFT knows the type, this package is imported, and nothing watches any more."""
    from peft.utils import PeftType

    watching = any(type(finder).__module__ == "sorsa_autoload" for finder in sys.meta_path)
    return ["SORSA" in PeftType.__members__, "sorsa_plugin" in sys.modules, not watching]


# -- ways to load an adapter -----------------------------------------------------------------------------------------


def peft_model() -> Model:
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)


def auto_peft_model() -> Model:
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(ADAPTER)


def deep_import() -> Model:
    from peft.config import PeftConfig
    from peft.peft_model import PeftModel

    config = PeftConfig.from_pretrained(ADAPTER)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER, config=config)


def auto_model() -> Model:
    return AutoModelForCausalLM.from_pretrained(ADAPTER)


def load_adapter() -> Model:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.load_adapter(ADAPTER)
    return model


def in_a_pipeline() -> Model:
    return pipeline("text-generation", model=ADAPTER).model


def logits(route: Callable[[], Model]) -> list[float]:
    """Of the last token."""
    model = route()
    model.eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        return model(TOKENS).logits[0, -1].tolist()


ROUTES = (peft_model, auto_peft_model, deep_import, auto_model, load_adapter, in_a_pipeline)


# -- other scripts ---------------------------------------------------------------------------------------------------


class Refusing:
    """Raises the error when a module is looked for."""

    def __init__(self, module: str, error: Exception) -> None:
        self.module, self.error = module, error

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self.module:
            raise self.error


def this_package_first() -> list[bool]:
    import sorsa_plugin  # noqa: F401

    return is_known()


def broken_registration() -> list[Any]:
    sys.meta_path.insert(0, Refusing("sorsa_plugin", ImportError("of another PEFT")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        known = is_known()
        import peft
    said = [str(warning.message) for warning in caught if "sorsa-plugin" in str(warning.message)]
    return [known, said, peft.LoraConfig(r=4).r]


def failed_import_of_peft() -> list[Any]:
    refusing = Refusing("peft.auto", ImportError("once"))
    sys.meta_path.insert(0, refusing)
    try:
        import peft  # noqa: F401
    except ImportError as error:
        sys.meta_path.remove(refusing)
        return [str(error), "sorsa_plugin" in sys.modules, is_known()]
    return []


def no_peft() -> str:
    sys.meta_path.insert(0, Refusing("peft", ModuleNotFoundError("No module named 'peft'", name="peft")))
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        return str(error)
    return ""


def lora_digest() -> list[Any]:
    """Whether this package is imported, and what a LoRA has become after five steps."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), LoraConfig(r=4, target_modules=["0"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    state = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return ["sorsa_plugin" in sys.modules, hashlib.sha256(state).hexdigest()]


def lora_digest_without() -> list[Any]:
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "sorsa_autoload"]
    return lora_digest()


OTHERS = (*(this_package_first, broken_registration, failed_import_of_peft, no_peft, lora_digest, lora_digest_without),)


def forked(work: Callable[[], Any]) -> Any:
    """What the work returned in a fork; None if it failed."""
    reading, writing = os.pipe()
    if not os.fork():
        status = 1
        try:
            os.write(writing, json.dumps(work()).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    os.wait()
    with os.fdopen(reading) as pipe:
        return json.loads(pipe.read() or "null")


if __name__ == "__main__":
    found = {"before": sorted({name.partition(".")[0] for name in sys.modules} & {"peft", "sorsa_plugin"})}
    found |= {route.__name__: forked(lambda route=route: logits(route)) for route in ROUTES}
    found |= {script.__name__: forked(script) for script in OTHERS}
    print(json.dumps(found))
