# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Every row of the table that upstream supports: equal numbers, keys and configs, and adapters that load both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recipes
import torch
from compare import assert_equal, assert_equal_grads, saved_facts
from peer import Peer

import cases
from cases import Row, rows

pytestmark = pytest.mark.interop
COMPARED = [row for row in rows() if row.in_peer and not row.method.triton]


def rows_in(*states: str) -> pytest.MarkDecorator:
    """The rows and states in which upstream can be compared with."""
    params = [
        pytest.param(row, state, id=f"{row.id}-{state}")
        for row in COMPARED
        for state in states
        if state in row.states and row.upstream(state) is None
    ]
    return pytest.mark.parametrize(("row", "state"), params)


def names(row: Row) -> dict[str, str]:
    return {"layer": row.layer.name, "form": row.form.name, "method": row.method.name}


def coarse(row: Row) -> torch.dtype:
    """The coarsest dtype that numbers of a row pass through; bitsandbytes rounds int8's inputs to float16."""
    return torch.float16 if row.form.name == "int8" else row.form.dtype


@pytest.mark.parametrize("init", [True, False, "gaussian"], ids=["default", "random", "gaussian"])
@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.id) for row in COMPARED if row.form.name in ("fp32", "nf4", "int8")]
)
def test_the_same_seed_gives_the_same_start(row: Row, init: bool | str, peer: Peer) -> None:
    theirs = peer.run("layer_init", **names(row), init_lora_weights=init)
    ours = recipes.run("layer_init", **names(row), init_lora_weights=init)
    wrong = row.upstream("train") is not None
    if wrong:  # their magnitude is off, or the layer is another one; the factors start alike all the same
        for side in (ours, theirs):
            side["parameters"] = {key: value for key, value in side["parameters"].items() if "magnitude" not in key}
    for key, tensor in theirs["parameters"].items():
        if "magnitude" not in key:
            assert torch.equal(ours["parameters"][key], tensor), key
    assert_equal(ours, theirs)


@rows_in("train", "dropout", "lora_bias", "low_precision")
def test_training(row: Row, state: str, peer: Peer) -> None:
    theirs = peer.run("layer_state", **names(row), state=state)
    ours = recipes.run("layer_state", **names(row), state=state)
    assert_equal(ours["y"], theirs["y"], "output", dtypes=False, loose=coarse(row))
    assert_equal_grads(ours["grads"], theirs["grads"], coarse(row))
    assert ours["y"].dtype == row.form.dtype


@rows_in("eval", "merged", "safe_merged", "unmerged", "disabled", "two_adapters", "deepcopied")
def test_states(row: Row, state: str, peer: Peer) -> None:
    theirs = peer.run("layer_state", **names(row), state=state)
    ours = recipes.run("layer_state", **names(row), state=state)
    stored = [side.pop("base", None) for side in (ours, theirs)]
    if row.form.quant is None:
        assert_equal(stored[0], stored[1], "base", loose=row.form.dtype)
        assert_equal(ours, theirs, dtypes=False, loose=coarse(row))
        return
    if stored[0] is not None:  # what is rounded to a grid may fall on a neighbour where the two sides differ by an ulp
        codes, others = (side["weight"].flatten() for side in stored)
        assert (codes != others).double().mean() < 0.05
        assert_close_on_average(ours["y"], theirs["y"])
        return
    assert_equal(ours, theirs, dtypes=False, loose=coarse(row))


def assert_close_on_average(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    difference = (ours.double() - theirs.double()).pow(2).mean().sqrt()
    assert difference <= 0.05 * theirs.double().pow(2).mean().sqrt(), f"differs by {difference:.3e} on average"


@rows_in("saved")
def test_saved_here_and_there(row: Row, state: str, peer: Peer, tmp_path: Path) -> None:
    """Keys, shapes, configs and file names are equal, and each side loads what the other wrote."""
    here, there = tmp_path / "ours", tmp_path / "theirs"
    theirs = peer.run("layer_state", **names(row), state="saved", folder=str(there))
    ours = recipes.run("layer_state", **names(row), state="saved", folder=str(here))
    # Their magnitude of a quantised layer starts as a norm rounded to the layer's dtype, ours is a float32 norm.
    assert_equal(saved_facts(ours["saved"]), saved_facts(theirs["saved"]), "saved", loose=row.form.dtype)
    check_loads(ours["y"], recipes.run("layer_state", **names(row), state="loaded", folder=str(there)), row, theirs)
    check_loads(theirs["y"], peer.run("layer_state", **names(row), state="loaded", folder=str(here)), row, ours)
    if row.upstream("low_cpu_mem") is None:
        loaded = recipes.run("layer_state", **names(row), state="low_cpu_mem", folder=str(there))
        check_loads(ours["y"], loaded, row, theirs)
        loaded = peer.run("layer_state", **names(row), state="low_cpu_mem", folder=str(here))
        check_loads(theirs["y"], loaded, row, ours)


def check_loads(y: torch.Tensor, loaded: dict[str, Any], row: Row, writer: dict[str, Any]) -> None:
    (written,) = writer["saved"]["tensors"].values()
    assert loaded["state"].keys() == written.keys()
    assert all(torch.equal(value, written[key]) for key, value in loaded["state"].items())
    assert_equal(loaded["y"], y, "output after loading", dtypes=False, loose=coarse(row))


def test_the_table_excludes_nothing_without_a_reason(peer: Peer) -> None:
    """Upstream cannot be compared with in few states, each for a stated reason that is true of its release."""
    excluded = [(row, state) for row in COMPARED for state in row.states if row.upstream(state)]
    assert len(excluded) < sum(len(row.states) for row in COMPARED) / 3
    assert {fault.reason for fault in cases.UPSTREAM_FAULTS} == {row.upstream(state) for row, state in excluded}


def test_the_peer_is_upstream(peer: Peer) -> None:
    import peft

    assert peer.version == cases.UPSTREAM
    assert peft.__version__ != peer.version and peft.__file__ != peer.location
