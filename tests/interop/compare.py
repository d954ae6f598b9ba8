# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Equality of what the two sides return: names and settings exactly, numbers to rounding."""

from __future__ import annotations

from typing import Any

import torch

ULPS = 16  # both sides round: what they may differ by on one layer, in units in the last place of the largest entry
DEEP = 128  # the same after the layers of a whole model; T5, whose attention is not scaled, needs most of it


def assert_equal(
    ours: Any,
    theirs: Any,
    where: str = "",
    *,
    dtypes: bool = True,
    loose: torch.dtype | None = None,
    scale: float = 0.0,
    ulps: int = ULPS,
) -> None:
    """Compare nested dicts and lists of tensors and plain values.

    Args:
        ours, theirs: What is compared.
        where: Named in the message.
        dtypes: Whether tensors must have the same dtype.
        loose: A dtype in which the numbers were rounded on the way, if it is coarser than their own.
        scale: The size of what went into the numbers, where they are what remains after cancellation.
        ulps: Units in the last place of the largest entry that numbers may differ by.

    Raises:
        AssertionError: At the first difference.
    """
    if isinstance(theirs, dict):
        assert isinstance(ours, dict), f"{where}: {type(ours).__name__}"
        missing, more = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
        assert not missing and not more, f"{where}: without {missing}, and with {more} in addition"
        for key, value in theirs.items():
            assert_equal(ours[key], value, f"{where}/{key}", dtypes=dtypes, loose=loose, scale=scale, ulps=ulps)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), f"{where}: {ours} is not {theirs}"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(a, b, f"{where}/{i}", dtypes=dtypes, loose=loose, scale=scale, ulps=ulps)
    elif isinstance(theirs, torch.Tensor):
        _assert_close(ours, theirs, where, dtypes, loose, scale, ulps)
    else:
        assert ours == theirs, f"{where}: {ours!r} is not {theirs!r}"


def _assert_close(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    where: str,
    dtypes: bool,
    loose: torch.dtype | None,
    scale: float,
    ulps: int,
) -> None:
    assert ours.shape == theirs.shape, f"{where}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    assert not dtypes or ours.dtype == theirs.dtype, f"{where}: {ours.dtype} is not {theirs.dtype}"
    if not theirs.is_floating_point():
        assert torch.equal(ours, theirs), f"{where}: differs"
        return
    if not theirs.numel():
        return
    dtype = max((ours.dtype, theirs.dtype, loose or theirs.dtype), key=lambda d: torch.finfo(d).eps)
    room = ulps * torch.finfo(dtype).eps * max(theirs.double().abs().max().item(), scale)
    worst = (ours.double() - theirs.double()).abs().max().item()
    assert worst <= room, f"{where}: differs by {worst:.3e}, allowed is {room:.3e}"


def assert_equal_grads(
    ours: dict[str, Any], theirs: dict[str, Any], loose: torch.dtype | None = None, ulps: int = ULPS
) -> None:
    """Compare gradients by name: those of one pass share the scale of its largest, as small ones are what cancels."""
    largest = max(grad.abs().max().item() for grad in theirs.values())
    assert_equal(ours, theirs, "gradients", loose=loose, scale=largest / 16, ulps=ulps)


def config_facts(config: dict[str, Any]) -> dict[str, Any]:
    """The content of an adapter_config.json without the version that wrote it and the order of sets."""
    facts = {key: value for key, value in config.items() if key != "peft_version"}
    for key in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
        if isinstance(facts.get(key), list):
            facts[key] = sorted(facts[key])
    return facts


def saved_facts(saved: dict[str, Any]) -> dict[str, Any]:
    """What `recipes.saved_files` gives, ready to be compared."""
    return {**saved, "configs": {name: config_facts(config) for name, config in saved["configs"].items()}}
