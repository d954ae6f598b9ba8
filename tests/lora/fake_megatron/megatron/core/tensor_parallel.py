# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""`megatron.core.tensor_parallel`: linear layers cut by rows or columns, and how activations pass between ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn


class _Copy(torch.autograd.Function):
    """The same on every rank; the gradients of all ranks are added up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        dy = dy.contiguous()
        distributed.all_reduce(dy)
        return dy


class _Reduce(torch.autograd.Function):
    """The sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy


class _Gather(torch.autograd.Function):
    """The ranks' last dimensions side by side; each rank gets its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy.chunk(distributed.get_world_size(), dim=-1)[distributed.get_rank()].contiguous()


gather_from_tensor_model_parallel_region = _Gather.apply


def split(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return x.chunk(distributed.get_world_size(), dim=dim)[distributed.get_rank()].contiguous()


class _Parallel(nn.Module):
    """What both layers share: arguments, parameters, and the pair that a call gives."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, init_method: Callable, bias: bool,
                 skip_bias_add: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.input_size, self.output_size, self.config, self.skip_bias_add = (
            input_size,
            output_size,
            config,
            skip_bias_add,
        )
        self.weight = nn.Parameter(torch.empty(self.shape(distributed.get_world_size())))
        init_method(self.weight)
        rows = len(self.weight)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass

    def finish(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.skip_bias_add or self.bias is None:
            return y, self.bias
        return y + self.bias, None


class ColumnParallelLinear(_Parallel):
    """W `[out / ranks, in]`."""

    def __init__(self, *args: Any, bias: bool = True, gather_output: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, bias=bias, **kwargs)
        self.gather_output = gather_output

    def shape(self, ranks: int) -> tuple[int, int]:
        return self.output_size // ranks, self.input_size

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        y, bias = self.finish(F.linear(_Copy.apply(x), self.weight))
        return (_Gather.apply(y) if self.gather_output else y), bias


class RowParallelLinear(_Parallel):
    """W `[out, in / ranks]`; the bias is whole."""

    def __init__(self, *args: Any, input_is_parallel: bool, skip_bias_add: bool, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=bias, skip_bias_add=skip_bias_add, **kwargs)
        self.input_is_parallel = input_is_parallel

    def shape(self, ranks: int) -> tuple[int, int]:
        return self.output_size, self.input_size // ranks

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = x if self.input_is_parallel else split(x)
        return self.finish(_Reduce.apply(F.linear(x, self.weight)))
