# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Whole transformers models on both sides: what is adapted, what it starts as, what it computes, and what it saves."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import recipes
import torch
from compare import DEEP, assert_equal, assert_equal_grads, saved_facts
from peer import Peer

pytestmark = pytest.mark.interop
every_case = pytest.mark.parametrize("name", models.CASES)


def coarse(name: str) -> torch.dtype:
    return torch.bfloat16 if "bf16" in name else torch.float32


def without_repeated(name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Leave out what upstream saves twice."""
    for key in models.CASES[name].repeated:
        tensors.pop(key, None)


@every_case
def test_the_same_seed_adapts_the_same_layers_alike(name: str, peer: Peer) -> None:
    theirs, ours = peer.run("model_init", name=name), recipes.run("model_init", name=name)
    assert_equal(ours, theirs)
    for key, tensor in theirs["parameters"].items():
        if "magnitude" not in key:
            assert torch.equal(ours["parameters"][key], tensor), key


@every_case
def test_outputs_gradients_and_files(name: str, peer: Peer, tmp_path: Path) -> None:
    theirs = peer.run("model_trained", name=name, folder=str(tmp_path / "theirs"))
    ours = recipes.run("model_trained", name=name, folder=str(tmp_path / "ours"))
    for part in ("y", "disabled", "merged"):
        assert_equal(ours[part], theirs[part], part, loose=coarse(name), ulps=DEEP)
    assert_equal_grads(ours["grads"], theirs["grads"], coarse(name), DEEP)
    for side in (ours, theirs):
        for tensors in side["saved"]["tensors"].values():
            without_repeated(name, tensors)
    assert_equal(saved_facts(ours["saved"]), saved_facts(theirs["saved"]), "saved")


@every_case
def test_each_side_loads_what_the_other_wrote(name: str, peer: Peer, tmp_path: Path) -> None:
    written = {
        "ours": recipes.run("model_trained", name=name, folder=str(tmp_path / "ours")),
        "theirs": peer.run("model_trained", name=name, folder=str(tmp_path / "theirs")),
    }
    for writer, results in written.items():
        folder = str(tmp_path / writer)
        here = recipes.run("model_loaded", name=name, folder=folder)
        there = peer.run("model_loaded", name=name, folder=folder)
        for side in (here, there):
            for state in side["state"].values():
                without_repeated(name, state)
        assert_equal(here, there, f"written by {writer}", loose=coarse(name), ulps=DEEP)
        assert_equal(here["y"], results["y"], f"written by {writer}: output", loose=coarse(name), ulps=DEEP)
