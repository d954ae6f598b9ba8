# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What is done with adapters that stand, on both sides: equal numbers, and refusals for the same reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import operation_recipes  # noqa: F401  registers its recipes
import pytest
import recipes
import torch
from compare import DEEP, assert_equal
from operations import OPERATIONS
from peer import Peer, PeerError

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str, peer: Peer, tmp_path: Path) -> None:
    operation = OPERATIONS[name]
    sides = []
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
        more = {"folder": str(tmp_path / folder)} if operation.folder else {}
        sides.append({**operation.arguments, **more})
    if operation.refused:
        kinds = operation.refused.split("|")
        with pytest.raises((TypeError, ValueError)) as here:
            recipes.run(operation.recipe, **sides[0])
        with pytest.raises(PeerError) as there:
            peer.run(operation.recipe, **sides[1])
        assert [type(here.value).__name__, there.value.kind] == [kinds[0], kinds[-1]]
        return
    ours = recipes.run(operation.recipe, **sides[0])
    assert all(torch.isfinite(tensor).all() for tensor in tensors_in(ours))
    if operation.there:
        if torch.cuda.is_available() and operation.recipe.startswith("loftq"):
            pytest.skip("it fails where there is no GPU")
        with pytest.raises(PeerError) as raised:
            peer.run(operation.recipe, **sides[1])
        assert raised.value.kind in operation.there.split("|"), raised.value
        return
    theirs = peer.run(operation.recipe, **sides[1])
    ulps = max(DEEP, operation.room / torch.finfo(torch.float32).eps)
    loose = torch.bfloat16 if operation.low_precision else None
    for part in theirs:
        if part not in operation.wrong:
            assert_equal(ours[part], theirs[part], part, loose=loose, ulps=ulps)
    if operation.recipe == "converted":
        assert_equal(ours["found"], ours["y"], "converted", ulps=8 * DEEP)


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for entry in entries for tensor in tensors_in(entry)]
