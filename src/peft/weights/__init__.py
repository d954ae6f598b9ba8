# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What is W? One question, answered by one class for each storage format: `find_weight(layer)` gives a `BaseWeight`
that reads, writes and keeps the layer's weight as a logical matrix [out, in], however its bytes are stored."""

from importlib import import_module
from pkgutil import iter_modules

from .base import BaseWeight, Packed, is_hooked
from .find import find_weight
from .formats import FORMATS, Format, is_a, reader_of, register
from .offloaded import present
from .sharded import filling, gathered, innermost, is_partitioned, remembering, shape_of, shards_of, whole

# A format is known by its file's being here; what is optional is imported when one of its layers is met.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "FORMATS",
    "BaseWeight",
    "Format",
    "Packed",
    "filling",
    "find_weight",
    "gathered",
    "innermost",
    "is_a",
    "is_hooked",
    "is_partitioned",
    "present",
    "reader_of",
    "register",
    "remembering",
    "shape_of",
    "shards_of",
    "whole",
]
