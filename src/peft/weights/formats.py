# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The storage formats that are known. Each file of this package registers its own here, told by names of classes, so that
a quantiser is imported only when one of its layers is met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from .base import BaseWeight


@dataclass(frozen=True)
class Format:
    """One storage format: how its layers are told, what reads them, and its row in the documentation's table.

    Args:
        name: What a reader calls it.
        weight: What reads its layers.
        layers: Qualified names of the layer classes that are in it, and with them those derived from one.
        tells: Whether a layer of a class with a plain weight, such as `nn.Linear`, is in it nevertheless.
        tensor: The class of the layers' `weight`, where formats that one `weight` reads differ in it.
        verified: Where the library itself runs in the tests; empty where its layers are built to its layout.
        remark: What else a reader has to know.
    """

    name: str
    weight: type[BaseWeight]
    layers: tuple[str, ...] = ()
    tells: Callable[[nn.Module], bool] | None = None
    tensor: str | None = None
    verified: str = ""
    remark: str = ""


FORMATS: list[Format] = []
_by_layer: dict[str, type[BaseWeight]] = {}
_by_kind: WeakKeyDictionary[type, type[BaseWeight] | None] = WeakKeyDictionary()


def register(*formats: Format) -> None:
    """Make storage formats known to `find_weight`, to "all-linear", to LoRA and to the documentation.

    Raises:
        ValueError: A format has the name or a layer class of one that is known, or nothing tells its layers.
    """
    for form in formats:
        taken = [name for name in form.layers if name in _by_layer]
        if taken or any(form.name == other.name for other in FORMATS):
            raise ValueError(
                f"register({form.name!r}): {taken[0] if taken else 'a format of this name'} is known already"
            )
        if not form.layers and form.tells is None:
            raise ValueError(f"register({form.name!r}): give `layers` or `tells`, by which its layers are told")
        FORMATS.append(form)
        _by_layer.update(dict.fromkeys(form.layers, form.weight))
    _by_kind.clear()


def reader_of(layer: nn.Module) -> type[BaseWeight] | None:
    """What reads a layer whose class is of a registered format; None for any other."""
    kind = type(layer)
    if kind not in _by_kind:
        _by_kind[kind] = next((_by_layer[name] for name in names_of(kind) if name in _by_layer), None)
    return _by_kind[kind]


def reader_of_plain(layer: nn.Module) -> type[BaseWeight] | None:
    """What reads a layer of a class with a plain weight that is in a registered format nevertheless; None for any other."""
    return next((form.weight for form in FORMATS if form.tells is not None and form.tells(layer)), None)


def is_a(layer: nn.Module, name: str) -> bool:
    """Whether a layer is of the class of this qualified name, or of one derived from it; nothing is imported."""
    return name in names_of(type(layer))


def names_of(kind: type) -> list[str]:
    """Qualified names of a class and of those that it derives from."""
    return [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
