"""Weights that accelerate keeps on the CPU or on disk come back while somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from accelerate.utils import align_module_device

Method = TypeVar("Method", bound=Callable[..., Any])


def with_base_weight(method: Method) -> Method:
    """A method of a layer that reads the base weight: while it runs, the weight is on the device that computes."""

    @wraps(method)
    def wrapper(layer: Any, *args: Any, **kwargs: Any) -> Any:
        with align_module_device(layer.get_base_layer()):
            return method(layer, *args, **kwargs)

    return wrapper  # type: ignore[return-value]
