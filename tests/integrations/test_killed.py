# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A run killed at any point goes on from its last whole checkpoint as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from loop_models import IDS, adapted, llama, losses, trained_state

from peft import PeftModel, set_peft_model_state_dict

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "source" / "developer_guides" / "troubleshooting.md"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder in which each point of `killed.POINTS` left what it had written when it was killed."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, str(HERE / "killed.py"), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    points = [line for line in done.stdout.splitlines() if re.match(r"(in|during)_\w+ ", line)]
    assert len(points) == 5 and all(line.endswith(f" {int(signal.SIGKILL)}") for line in points), done.stdout
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from killed import trainer

    run = trainer(tmp_path_factory.mktemp("whole"))
    run.train()
    return losses(run), trained_state(run.model)


def last_whole_checkpoint(folder) -> str | None:
    """As the page tells people to find it."""
    block = next(b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL) if "def last_" in b)
    scope: dict = {}
    exec(block.split("\n\n\ntrainer.train")[0], scope)
    return scope["last_whole_checkpoint"](folder)


@pytest.mark.works_with("transformers", "going on after `kill -9` in a step or in any file of a checkpoint")
@pytest.mark.parametrize(
    ("point", "last"),
    [("during_a_step", 4), ("in_the_adapter", 2), ("in_the_optimizer", 2), ("in_the_trainers_state", 2)],
)
def test_training_goes_on(killed, whole, point, last):
    from killed import trainer

    folder = killed / point
    assert (folder / "checkpoint-4").is_dir() and not (folder / "checkpoint-6").exists()
    checkpoint = last_whole_checkpoint(folder)
    assert checkpoint == str(folder / f"checkpoint-{last}")
    PeftModel.from_pretrained(llama(), checkpoint)
    resumed = trainer(folder)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses(resumed) == whole[0]
    for name, expected in whole[1].items():
        assert torch.equal(trained_state(resumed.model)[name], expected), name
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-6")
    for step in (2, 4, 6):  # what the killed process left has been replaced
        PeftModel.from_pretrained(llama(), folder / f"checkpoint-{step}")


@pytest.mark.works_with("torch", "distributed checkpoints, killed while a shard was written")
def test_the_checkpoint_before_the_killed_shard_loads(killed):
    folder = killed / "in_a_shard"
    assert list((folder / "step-2").glob("*.distcp")) and not (folder / "step-2" / ".metadata").exists()
    from killed import adapter_state

    state = {"adapter": adapter_state(0.0)}
    dcp.load(state, checkpoint_id=folder / "step-1", no_dist=True)
    model = adapted()
    assert not set_peft_model_state_dict(model, state["adapter"]).unexpected_keys
    assert all(bool((value == 1.0).all()) for value in trained_state(model).values())
    with torch.no_grad():
        assert torch.isfinite(model.eval()(IDS).logits).all()
