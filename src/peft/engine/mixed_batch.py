# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""One batch, several adapters: handing the adapter of each row to the layers for the length of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from peft.utils.other import AuxiliaryTrainingWrapper

from .layer import BaseTunerLayer
from .machine import BASE_ADAPTER


@contextmanager
def adapter_names_hooks(model: nn.Module, adapter_names: list[str], copies: int = 1) -> Iterator[None]:
    """Give every adapted layer `adapter_names` as a keyword argument; the hooks go whatever happens inside.

    Args:
        model: Model with adapted layers.
        adapter_names: One name a row of the batch.
        copies: How often generation may repeat each row in place, for beams or several sequences.

    Raises:
        ValueError: A name belongs to no adapter of the model.
    """
    modules = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    known = {BASE_ADAPTER}.union(*(module._get_available_adapters() for module in modules))
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(
            f"adapter_names holds {', '.join(map(repr, unknown))}, which this model does not have; "
            f"it has {', '.join(map(repr, sorted(known)))}."
        )

    def hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        names = adapter_names
        rows = len(args[0]) if args else len(names)
        if rows == copies * len(names):
            names = [name for name in names for _ in range(copies)]
        return args, {**kwargs, "adapter_names": names}

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hand_over, with_kwargs=True).remove)
        yield


def copies_in_generation(kwargs: dict[str, Any]) -> int:
    """How many rows `generate` makes of each row of its batch, from the arguments of the call."""
    settings = kwargs.get("generation_config")
    counts = [kwargs.get(name) or getattr(settings, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    return max(counts)
