# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What is W? One question, answered by one class for each storage format: `find_weight(layer)` gives a `BaseWeight`
that reads, writes and keeps the layer's weight as a logical matrix [out, in], however its bytes are stored."""

from .base import BaseWeight, Packed, is_hooked
from .find import find_weight, is_a
from .offloaded import present
from .sharded import filling, gathered, innermost, is_partitioned, remembering, shape_of, shards_of, whole

__all__ = [
    "BaseWeight",
    "Packed",
    "filling",
    "find_weight",
    "gathered",
    "innermost",
    "is_a",
    "is_hooked",
    "is_partitioned",
    "present",
    "remembering",
    "shape_of",
    "shards_of",
    "whole",
]
