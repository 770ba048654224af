"""How a public name is written down: a function's signature, a class's fields, bases and methods, as text."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

METHODS = {
    "AdapterSetup": ["add_callbacks", "wrap"],
    "Analysis": ["last", "save", "summaries"],
    "Attachment": ["detach", "gaps", "metrics", "penalty"],
    "ResidualReport": ["adapter"],
    "SORSAConfig": ["from_lora"],
    "SORSALayer": [
        "base_matrix",
        "delta_to_weight",
        "factors",
        "get_delta_weight",
        "get_factors",
        "lora_layout",
        "parameter_name",
        "set_factors",
    ],
    "SORSAModel": ["fold", "initial_energy", "unfold"],
}
"""Methods, properties and attributes that the documents name, or that a layer kind of another package has."""


def described(value: Any, name: str) -> dict[str, Any]:
    """A function's signature; of a class also its bases, its own fields and the methods of `METHODS`."""
    if not inspect.isclass(value):
        return {"function": signature(value)} if inspect.isroutine(value) else {"object": type(value).__name__}
    made: dict[str, Any] = {"class": constructor(value), "bases": bases(value)}
    if dataclasses.is_dataclass(value):
        made |= {"fields": fields(value), "frozen": value.__dataclass_params__.frozen}
    elif issubclass(value, _pydantic_model()):
        types = inspect.get_annotations(value)
        made["fields"] = {
            key: f"{annotation(types[key])} = {plain(item.default)}" for key, item in value.model_fields.items()
        }
    if name in METHODS:
        made["methods"] = {method: member(inspect.getattr_static(value, method, None)) for method in METHODS[name]}
    return made


def bases(kind: type) -> list[str]:
    """The nearest that are of other packages: how a class of ours is split up is our own affair."""
    found: dict[str, None] = {}
    for base in kind.__bases__:
        found |= dict.fromkeys(bases(base) if ours(base) else [base.__name__])
    return [name for name in found if name != "object"]


def constructor(kind: type) -> str:
    """Its signature; that of a base from another package belongs to that package, and a dataclass's is its fields."""
    owner = next(base for base in kind.__mro__ if "__init__" in vars(base) or "__new__" in vars(base))
    if dataclasses.is_dataclass(kind):
        return "a dataclass"
    return signature(kind) if ours(owner) else f"as {owner.__name__}"


def ours(kind: type) -> bool:
    return kind.__module__.startswith("sorsa_")


def fields(kind: Any) -> dict[str, str]:
    """{name: "type = default"} of the fields that our classes declare; PEFT's configs have others in each version."""
    declared = {
        name: written for base in kind.__mro__ if ours(base) for name, written in inspect.get_annotations(base).items()
    }
    items = {item.name: item for item in dataclasses.fields(kind)}
    return {name: field(item, declared[name]) for name, item in items.items() if name in declared}


def field(item: Any, written: Any) -> str:
    """A field as its class writes it; HfArgumentParser changes the types that dataclasses keep."""
    text = annotation(written)
    if item.default_factory is not dataclasses.MISSING:
        text += f" = {item.default_factory()!r}, made anew"
    elif item.default is not dataclasses.MISSING:
        text += f" = {plain(item.default)}"
    return text


def member(value: Any) -> str:
    if value is None:
        return "gone"
    if isinstance(value, classmethod):
        return f"classmethod {signature(value.__func__)}"
    if isinstance(value, property):
        return f"property -> {annotation(inspect.signature(value.fget).return_annotation)}"
    return signature(value) if callable(value) else f"= {plain(value)}"


def signature(value: Any) -> str:
    """As `inspect.signature` has it, written out here: Python versions write annotations differently."""
    found, words, kinds = inspect.signature(value), [], inspect.Parameter
    starred = False
    for item in found.parameters.values():
        if item.kind is kinds.KEYWORD_ONLY and not starred:
            words.append("*")
        starred = starred or item.kind in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL)
        stars = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(item.kind, "")
        text = f"{stars}{item.name}" + (f": {annotation(item.annotation)}" if item.annotation is not item.empty else "")
        words.append(text + (f" = {plain(item.default)}" if item.default is not item.empty else ""))
    result = "" if found.return_annotation is found.empty else f" -> {annotation(found.return_annotation)}"
    return f"({', '.join(words)}){result}"


def annotation(value: Any) -> str:
    """Without the modules of its names, which may move."""
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)


def plain(value: Any) -> str:
    """A default as text that is alike in all processes."""
    return value.__name__ if inspect.isclass(value) or inspect.isroutine(value) else repr(value)


def _pydantic_model() -> type:
    from pydantic import BaseModel

    return BaseModel
