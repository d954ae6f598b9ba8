# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Groups of processes that a whole session of tests shares: starting one costs seconds, a job on it milliseconds."""

from __future__ import annotations

import importlib
import os
import queue
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT_S = 240


class RankError(AssertionError):
    """A job failed in one of the ranks; the message holds its traceback."""


class Ranks:
    """`world` processes in one process group.

    Args:
        world: How many.
        device: "cpu" for gloo, "cuda" for NCCL with one GPU a rank.
    """

    def __init__(self, world: int, device: str = "cpu") -> None:
        self.world, self.device = world, device
        self._processes: list[Any] = []

    def run(self, job: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`job(*args, **kwargs)` on every rank at once, and what each returned; `job` is a function of a module.

        Raises:
            RankError: A rank raised, died or did not answer; the group is started anew for the next job.
        """
        if not self._processes:
            self._start()
        # Test modules are no packages: a child finds the function by its module's name on the path.
        where = job.__module__, job.__qualname__
        for inbox in self._inboxes:
            inbox.put((*where, args, kwargs))
        answers: dict[int, Any] = {}
        end = time.monotonic() + TIMEOUT_S
        try:
            while len(answers) < self.world:
                rank, error, value = self._answer(where[1], set(range(self.world)) - set(answers), end)
                if error is not None:
                    raise RankError(f"rank {rank} of {self.world}: {where[1]} failed\n{error}")
                answers[rank] = value
        except RankError:
            self.close()
            raise
        return [answers[rank] for rank in range(self.world)]

    def _answer(self, job: str, missing: set[int], end: float) -> tuple[int, str | None, Any]:
        while True:
            dead = {rank for rank in missing if not self._processes[rank].is_alive()}
            try:
                return self._outbox.get(timeout=1)
            except queue.Empty:
                if dead:
                    codes = {rank: self._processes[rank].exitcode for rank in sorted(dead)}
                    raise RankError(f"{job}: ranks died, with exit codes {codes}") from None
                if time.monotonic() > end:
                    raise RankError(f"{job}: no answer from ranks {sorted(missing)} within {TIMEOUT_S} s") from None

    def _start(self) -> None:
        # One server imports what every rank needs and forks them all; it never touches a GPU.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["peft", "transformers.models.llama.modeling_llama", "torch.distributed.fsdp"])
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(self.world)]
        port = _free_port()
        self._processes = [
            context.Process(
                target=_serve, args=(rank, self.world, self.device, port, inbox, self._outbox), daemon=True
            )
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, world: int, device: str, port: int, inbox: Any, outbox: Any) -> None:
    """The main function of a rank: jobs in, results out, until the parent kills it."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    torch.set_num_threads(1)
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # deepspeed takes a GPU where it finds one
    if device == "cuda":
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast is not had in every container
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_S)
    )
    while True:
        module, name, args, kwargs = inbox.get()
        try:
            torch.manual_seed(0)
            job: Any = sys.modules.get(module) or importlib.import_module(module)
            for part in name.split("."):
                job = getattr(job, part)
            value, error = job(*args, **kwargs), None
        except BaseException:
            value, error = None, traceback.format_exc()
        outbox.put((rank, error, value))
