# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""MonteCLoRA and Arrow against upstream's release: numbers, gradients, files, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import recipes
import recipes_family  # noqa: F401  registers its recipes
from compare import DEEP, assert_equal, assert_equal_grads, saved_facts
from peer import Peer

pytestmark = pytest.mark.interop


def test_monteclora_samples_and_divergences(peer: Peer) -> None:
    assert_equal(recipes.run("monteclora_sampler"), peer.run("monteclora_sampler"))


def test_monteclora(peer: Peer, tmp_path: Path) -> None:
    here, there = str(tmp_path / "ours"), str(tmp_path / "theirs")
    ours, theirs = recipes.run("monteclora", folder=here), peer.run("monteclora", folder=there)
    assert_equal_grads(ours.pop("grads"), theirs.pop("grads"))
    assert_equal(saved_facts(ours.pop("saved")), saved_facts(theirs.pop("saved")), "saved")
    assert_equal(ours, theirs)
    for folder in (here, there):
        loaded = recipes.run("monteclora_loaded", folder=folder)
        assert_equal(loaded, peer.run("monteclora_loaded", folder=folder))
        assert_equal(loaded["y"], ours["eval"])


@pytest.mark.parametrize("use_gks", [False, True])
def test_arrow(use_gks: bool, peer: Peer, tmp_path: Path) -> None:
    experts = str(tmp_path / "experts")
    peer.run("arrow_experts", folder=experts)
    ours = recipes.run("arrow", folder=str(tmp_path / "ours"), experts=experts, use_gks=use_gks)
    theirs = peer.run("arrow", folder=str(tmp_path / "theirs"), experts=experts, use_gks=use_gks)
    for side in (ours, theirs):
        (config,) = side["saved"]["configs"].values()
        assert config["arrow_config"]["task_adapter_names"] == ["task_0", "task_1", "task_2"]
        (tensors,) = side["saved"]["tensors"].values()
        for key in tensors:  # they start at random and are not used
            tensors[key] = list(tensors[key].shape)
    assert_equal(saved_facts(ours.pop("saved")), saved_facts(theirs.pop("saved")), "saved")
    assert_equal(ours, theirs, ulps=DEEP)
