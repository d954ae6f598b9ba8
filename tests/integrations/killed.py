# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Runs that are killed: `python killed.py FOLDER` forks one process for each point, which kills itself there."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

torch.set_num_threads(1)  # before anything runs: threads do not survive a fork

import torch.distributed.checkpoint as dcp  # noqa: E402
from loop_models import DATA, adapted, arguments  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402

import peft.peft_model.saving as saving  # noqa: E402
from peft import get_peft_model_state_dict  # noqa: E402

STEPS, EVERY = 6, 2


def trainer(folder: Any, callbacks: tuple = ()) -> Trainer:
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": EVERY}
    model = adapted(lora_dropout=0.1)
    return Trainer(model, arguments(folder, **options), train_dataset=DATA, callbacks=list(callbacks))


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def halve_and_kill(path: Any) -> None:
    """Cut a file that was just written in half, as if its writer had been killed then."""
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    kill()


class KillAt(TrainerCallback):
    """Kills the process in the middle of a step: gradients are there, parameters not yet changed."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 4:
            kill()


def during_a_step(folder: pathlib.Path) -> None:
    trainer(folder, (KillAt(),)).train()


def at_the_second(write: Callable[..., Any], is_it: Callable[..., Any]) -> Callable[..., Any]:
    """A writer that is killed half-way through its second file of those for which `is_it` gives the path."""
    seen = []

    def writer(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        path = is_it(*args, **kwargs)
        if path is not None:
            seen.append(path)
            if len(seen) == 2:
                halve_and_kill(path)
        return result

    return writer


def in_the_adapter(folder: pathlib.Path) -> None:
    saving.save_file = at_the_second(saving.save_file, lambda state, path, **_: path)
    trainer(folder).train()


def in_the_optimizer(folder: pathlib.Path) -> None:
    def is_it(value: Any, path: Any, *_: Any, **__: Any) -> Any:
        return path if pathlib.Path(path).name == "optimizer.pt" else None

    torch.save = at_the_second(torch.save, is_it)
    trainer(folder).train()


class HalfState(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 4:
            halve_and_kill(pathlib.Path(args.output_dir) / "checkpoint-4" / "trainer_state.json")


def in_the_trainers_state(folder: pathlib.Path) -> None:
    trainer(folder, (HalfState(),)).train()


def adapter_state(value: float) -> dict[str, torch.Tensor]:
    return {key: torch.full_like(tensor, value) for key, tensor in get_peft_model_state_dict(adapted()).items()}


def in_a_shard(folder: pathlib.Path) -> None:
    """torch's distributed checkpoints: one file a process, and `.metadata` once all are whole."""
    for step in (1, 2):
        if step == 2:
            os.fsync = lambda descriptor: halve_and_kill(f"/proc/self/fd/{descriptor}")
        dcp.save({"adapter": adapter_state(float(step))}, checkpoint_id=folder / f"step-{step}", no_dist=True)


POINTS = (during_a_step, in_the_adapter, in_the_optimizer, in_the_trainers_state, in_a_shard)


def main(folder: pathlib.Path) -> None:
    for point in POINTS:
        place = folder / point.__name__
        place.mkdir()
        child = os.fork()
        if child == 0:
            point(place)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(point.__name__, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ended by itself")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
