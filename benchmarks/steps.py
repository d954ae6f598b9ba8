# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What one step of a case does: a training step, a prefill, or a decoded token; eager, compiled, or captured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from registry import Case
from torch import nn
from transformers import DynamicCache

SEED = 20260322
LEARNING_RATE = 1e-4
EAGER_STEPS = 2  # before a step is captured: lazy state is made in them, and kernels are compiled


def make_step(model: nn.Module, case: Case, mode: str, engine: Any = None) -> Callable[[], torch.Tensor]:
    """A function that runs one step of `case` on the device and returns its loss (a scalar) or its logits.

    `engine` is DeepSpeed's where backward passes and steps are its business.
    """
    if mode == "compiled":
        for layer in model.modules():
            if type(layer).__name__ == "LlamaDecoderLayer":
                layer.compile(fullgraph=True)
    step = training_step(model, case, mode, engine) if case.kind == "train" else inference_step(model, case, mode)
    return Captured(step) if mode == "graph" else step


def make_autocast(case: Case, mode: str) -> Callable:
    """The context of a forward pass. What autocast keeps of casts would be lost between a capture and its replays."""
    if stored_dtype(case) == torch.float32:
        return nullcontext
    return lambda: torch.autocast(case.device, torch.bfloat16, cache_enabled=mode != "graph")


def stored_dtype(case: Case) -> torch.dtype:
    """Of what is not packed, and of the packed layers' products."""
    return torch.float32 if case.base == "fp32" else torch.bfloat16


def random_ids(case: Case, *shape: int) -> torch.Tensor:
    generator = torch.Generator(case.device).manual_seed(SEED + 2)
    return torch.randint(case.widths.vocab, shape, device=case.device, generator=generator)


def training_step(model: nn.Module, case: Case, mode: str, engine: Any = None) -> Callable[[], torch.Tensor]:
    """One optimizer step; the loss is the mean over its micro-batches."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    capturable = {"capturable": True} if mode == "graph" else {}
    ours = bool(trained) and engine is None
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True, **capturable) if ours else None
    autocast = make_autocast(case, mode)
    if case.mlp:
        generator = torch.Generator(case.device).manual_seed(SEED + 2)
        shape = (case.batch, case.seq, case.widths.hidden)
        values = torch.randn(2, *shape, device=case.device, generator=generator).to(stored_dtype(case))
        x, dy = values[0].clone().requires_grad_(), values[1].clone()
    else:
        ids = random_ids(case, case.accumulation, case.batch, case.seq)

    def forward_backward(i: int) -> torch.Tensor:
        with autocast():
            if case.mlp:
                out = model(x)
            else:
                loss = model(input_ids=ids[i], labels=ids[i]).loss / case.accumulation
        if case.mlp:
            out.backward(dy.to(out.dtype))
            x.grad = None
            return (out.detach().float() * dy.float()).mean()
        if engine is None:
            loss.backward()
        else:
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()
        return loss.detach()

    def step() -> torch.Tensor:
        total = sum(forward_backward(i) for i in range(case.accumulation))
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    return step


def inference_step(model: nn.Module, case: Case, mode: str) -> Callable[[], torch.Tensor]:
    """One forward pass without gradient: of a prompt, or of one token after a prompt that is in the cache."""
    ids = random_ids(case, case.batch, case.seq + 1)
    names = (
        {"adapter_names": [adapter_name(i % case.adapters) for i in range(case.batch)]} if case.adapters > 1 else {}
    )
    autocast = make_autocast(case, mode)

    @torch.no_grad()
    def forward(tokens: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
        with autocast():
            return model(
                input_ids=tokens, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1, **names
            ).logits

    if case.kind == "prefill":
        return lambda: forward(ids[:, :-1], None)
    cache = DynamicCache()
    forward(ids[:, :-1], cache)
    held = [(layer, layer.keys, layer.values) for layer in cache.layers]

    def next_token() -> torch.Tensor:
        for layer, keys, values in held:  # each step has the same context
            layer.keys, layer.values = keys, values
        return forward(ids[:, -1:], cache)

    return next_token


def adapter_name(i: int) -> str:
    """What the `i`-th adapter is called."""
    return "default" if i == 0 else f"adapter{i}"


@torch.no_grad()
def loss_of(result: torch.Tensor, case: Case) -> float:
    """The number by which a step is compared with another package's: a loss, of logits that of the first ids."""
    if result.dim() == 0:
        return result.item()
    return F.cross_entropy(result[:, -1].float(), random_ids(case, case.batch, case.seq + 1)[:, 0]).item()


class Captured:
    """A step that runs eagerly on a stream of its own at first, is then captured, and from there on is replayed.

    A replayed step reads and writes what it did when it was captured: the same micro-batches, the same cache of keys.

    Args:
        step: What to run.
    """

    def __init__(self, step: Callable[[], torch.Tensor]) -> None:
        self.step, self.calls = step, 0
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        if self.calls <= EAGER_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.step()
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.calls == EAGER_STEPS + 1:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.step()
        self.graph.replay()
        return self.result
