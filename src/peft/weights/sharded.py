# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights that are spread over processes: DTensors (FSDP2, tensor parallel), FSDP's flat parameters and DeepSpeed
ZeRO-3's partitions. Each process reads the part that it holds; what is summed over parts is reduced, W never gathered."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from .base import BaseWeight, held_parameter, is_hooked, writing
from .offloaded import present


class Piece:
    """A block of a logical matrix, read like a weight of its own.

    Args:
        row, column: Where it begins in the whole matrix.
        matrix: Its entries `[rows, columns]`.
    """

    __slots__ = ("column", "matrix", "row")

    def __init__(self, row: int, column: int, matrix: torch.Tensor) -> None:
        self.row, self.column, self.matrix = row, column, matrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def T(self) -> Piece:
        return Piece(self.column, self.row, self.matrix.T)

    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        block = self.matrix[a:b]
        return block if dtype is None else block.to(dtype)

    def on(self, device: torch.device) -> Piece:
        return self if self.matrix.device == device else Piece(self.row, self.column, self.matrix.to(device))

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same block of another tensor of the whole matrix's shape, as a view."""
        rows, columns = self.shape
        return tensor[self.row : self.row + rows, self.column : self.column + columns]


class Shards(NamedTuple):
    """What this process holds of a stored tensor.

    Args:
        shape: The whole tensor's, flattened to two dimensions.
        local: This process's entries, as a live view: a block of the matrix, or a run of its entries in row-major order.
        start: Where they begin: (row, column) of a block, or the entry.
        groups: The process groups that share the tensor among them; a sum over all is one over each in turn.
    """

    shape: tuple[int, int]
    local: torch.Tensor
    start: tuple[int, int] | int
    groups: tuple[Any, ...]

    def pieces(self) -> list[Piece]:
        if isinstance(self.start, int):
            return pieces_of_run(self.local, self.start, self.shape[1])
        return [Piece(*self.start, self.local)] if self.local.numel() else []

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` up over the processes that share the shards, in place."""
        for group in self.groups:
            torch.distributed.all_reduce(tensor, group=group)
        return tensor


def pieces_of_run(run: torch.Tensor, start: int, columns: int) -> list[Piece]:
    """The entries from `start` on of a matrix with that many columns: the end of a row, whole rows, the start of one."""
    pieces, position, left = [], start, run.numel()
    while left:
        row, column = divmod(position, columns)
        whole = column == 0 and left >= columns
        count = left // columns * columns if whole else min(columns - column, left)
        here = run[position - start : position - start + count]
        pieces.append(Piece(row, column, here.view(-1, columns) if whole else here[None]))
        position, left = position + count, left - count
    return pieces


# ---- what is sharded, and how --------------------------------------------------------------------------------------
def innermost(module: nn.Module) -> nn.Module:
    """The module inside FSDP's and activation checkpointing's wrappers."""
    while (
        inner := module._modules.get("_fsdp_wrapped_module", module._modules.get("_checkpoint_wrapped_module"))
    ) is not None:
        module = inner
    return module


def shards_of(module: nn.Module, name: str = "weight") -> Shards | None:
    """What this process holds of a parameter that is spread over several now; None where it is whole.

    Args:
        module: The layer, or FSDP's wrapper around it.
        name: The parameter's name in the layer.

    Raises:
        ValueError: It is sharded in a way that is not known.
    """
    flat = _flat_parameter(module)
    if flat is not None:
        return _shards_of_flat(flat, name, module._handle.process_group)
    parameter = held_parameter(innermost(module), name)
    if parameter is None or type(parameter) is nn.Parameter and not hasattr(parameter, "ds_id"):
        return None
    if hasattr(parameter, "ds_id"):
        return _shards_of_partition(parameter)
    return _shards_of_dtensor(parameter) if hasattr(parameter, "placements") else None


def _flat_parameter(module: nn.Module) -> Any:
    """The flat parameter of a layer that FSDP wrapped by itself, while it is sharded."""
    handle = module.__dict__.get("_handle")
    if handle is None or not handle.uses_sharded_strategy:
        return None
    return handle.flat_param


def _two_dims(shape: Any) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _shards_of_flat(flat: Any, name: str, group: Any) -> Shards | None:
    index = next((i for i, info in enumerate(flat._param_infos) if info.param_name == name), None)
    if index is None:
        return None
    info = flat._shard_param_infos[index]
    shard = getattr(flat, "_local_shard", flat.data)
    local = shard.detach()[:0]
    if info.in_shard:
        local = shard.detach()[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]
    return Shards(_two_dims(flat._shapes[index]), local, info.intra_param_start_idx or 0, (group,))


def _shards_of_partition(parameter: Any) -> Shards | None:
    if _is_available(parameter):
        return None
    local, start = _run_of_partition(parameter)
    return Shards(_two_dims(parameter.ds_shape), local, start, (getattr(parameter, "ds_process_group", None),))


def _is_available(parameter: Any) -> bool:
    return parameter.ds_status.name == "AVAILABLE" and parameter.numel() == math.prod(parameter.ds_shape)


def _run_of_partition(parameter: Any) -> tuple[torch.Tensor, int]:
    """This process's entries of a partitioned parameter, without what fills them up, and where they begin."""
    held = parameter.ds_tensor
    rank = torch.distributed.get_rank(getattr(parameter, "ds_process_group", None))
    start = min(rank * held.numel(), parameter.ds_numel)
    return held.detach().view(-1)[: min(held.numel(), parameter.ds_numel - start)], start


def _shards_of_dtensor(parameter: Any) -> Shards:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements
    split = [i for i, placement in enumerate(placements) if placement.is_shard() or not placement.is_replicate()]
    if any(not placements[i].is_shard() or placements[i].dim > 1 for i in split):
        raise ValueError(
            f"a weight of shape {tuple(parameter.shape)} placed as {placements}: its norm can be summed over shards of "
            "dimensions 0 and 1; distribute it along one of these."
        )
    local = parameter.detach().to_local()
    _, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    start = offset[0], (offset[1] if len(offset) > 1 else 0) * math.prod(parameter.shape[2:])
    matrix = local.flatten(1) if local.dim() > 1 else local[:, None]
    return Shards(_two_dims(parameter.shape), matrix, start, tuple(mesh.get_group(i) for i in split))


# ---- whole parameters, small ones ----------------------------------------------------------------------------------
_remembered: ContextVar[dict[nn.Module, torch.Tensor] | None] = ContextVar("remembered", default=None)


@contextlib.contextmanager
def remembering(*modules: nn.Module) -> Iterator[None]:
    """While it is open, `whole` gives a copy of what a module's weight was when the module was last called.

    So what FSDP or ZeRO gathered for the call need not be gathered again to be read. Ordinary modules are left alone.
    """
    watched = {innermost(module): module for module in modules}
    watched = [inner for inner, module in watched.items() if inner is not module or is_hooked(module)]
    if not watched:
        yield
        return
    seen: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if shards_of(module) is None and not module.weight.is_meta:
            seen[module] = module.weight.detach().clone()

    # Before whoever lets the weight go again.
    handles = [module.register_forward_hook(keep, prepend=True) for module in watched]
    token = _remembered.set(seen)
    try:
        yield
    finally:
        _remembered.reset(token)
        for handle in handles:
            handle.remove()


def whole(module: nn.Module, name: str = "weight") -> torch.Tensor | None:
    """A parameter of a module, gathered without gradient where it is sharded, read from accelerate's store where it is
    offloaded; for small ones.

    Args:
        module: A layer, or FSDP's wrapper around it.
        name: The parameter's name in the layer.
    """
    inner = innermost(module)
    seen = None if torch.compiler.is_compiling() else _remembered.get()  # which Dynamo does not trace
    if name == "weight" and seen and inner in seen:
        return seen[inner]
    shards = shards_of(module, name)
    if shards is None:
        return present(inner, name)
    flat = shards.local.new_zeros(shards.shape)
    for piece in shards.pieces():
        piece(flat).copy_(piece.matrix)
    return shards.sum(flat).view(_whole_shape(module, name))


def _whole_shape(module: nn.Module, name: str) -> torch.Size:
    flat = _flat_parameter(module)
    if flat is not None:
        return next(
            shape for shape, info in zip(flat._shapes, flat._param_infos, strict=True) if info.param_name == name
        )
    return shape_of(held_parameter(innermost(module), name))


def gathered(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with every DTensor and every partitioned parameter made whole; all processes must call it."""
    return {name: _gathered(value) for name, value in state.items()}


def _gathered(value: torch.Tensor) -> torch.Tensor:
    if hasattr(value, "full_tensor"):
        # Offloaded shards lie on the CPU, where the group may have nothing to send by.
        return value.detach().to(value.device_mesh.device_type).full_tensor()
    if hasattr(value, "ds_id"):
        holder = nn.Module()
        holder._parameters["weight"] = value
        return whole(holder)
    return value


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds parameters of the model."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def shape_of(tensor: torch.Tensor) -> torch.Size:
    """A parameter's shape; where ZeRO-3 holds it, that of the whole."""
    return getattr(tensor, "ds_shape", tensor.shape)


@contextlib.contextmanager
def filling(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """While it is open, what ZeRO-3 holds of the parameters is whole and may be written to, alike in all processes.

    When it closes every process keeps its share of what stands there then, also where DeepSpeed's optimizer, of
    whatever stage, has copies in float32: its next step starts from these.
    """
    parameters = list(parameters)
    held = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    here = [parameter for parameter in held if _is_available(parameter)]
    away = [parameter for parameter in held if not _is_available(parameter)]
    with contextlib.ExitStack() as stack:
        if away:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(away, modifier_rank=0))
        yield
        for parameter in here:
            local, start = _run_of_partition(parameter)
            local.copy_(parameter.detach().flatten()[start : start + local.numel()])
        for parameter in parameters:
            _renew_master(parameter)


def _renew_master(parameter: torch.Tensor) -> None:
    """Copy a parameter that is whole into what DeepSpeed's optimizer steps from, if it has that."""
    optimizer = getattr(parameter, "_z3_optimizer", None)
    if optimizer is not None and parameter.requires_grad:
        local, start = _run_of_partition(parameter)
        own = parameter.detach().flatten()[start : start + local.numel()]
        optimizer.set_local_hp_param(nn.functional.pad(own, (0, parameter.ds_tensor.numel() - own.numel())), parameter)
    elif getattr(parameter, "_hp_mapping", None) is not None:
        parameter.set_full_hp_param(parameter.detach())


# ---- the weight ----------------------------------------------------------------------------------------------------
class ShardedWeight(BaseWeight):
    """The weight of a base layer that is spread over processes, whatever its stored format.

    What gives or takes the whole matrix is a collective operation: every process of the group must call it.

    Args:
        layer: The base layer, or FSDP's wrapper around it.
        plain: The reader of the same layer's weight while it is whole.
        shards: What this process holds of it.
    """

    format = "sharded"

    def __init__(self, layer: nn.Module, plain: Any, shards: Shards) -> None:
        super().__init__(innermost(layer))
        self.shards = shards
        self.transposed = getattr(plain, "transposed", False)

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.shards.shape
        return (second, first) if self.transposed else (first, second)

    @property
    def dtype(self) -> torch.dtype:
        return self.shards.local.dtype

    @property
    def device(self) -> torch.device:
        return self.shards.local.device

    @property
    def bias(self) -> torch.Tensor | None:
        return whole(self.layer, "bias")

    @property
    def lossy(self) -> bool:
        return False

    def pieces(self) -> list[Piece]:
        """The blocks of the logical matrix `[out, in]` that this process holds, as views where nothing is packed."""
        pieces = self.shards.pieces()
        return [piece.T for piece in pieces] if self.transposed else pieces

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over the processes that share the weight, in place."""
        return self.shards.sum(tensor)

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for piece in self.pieces():
            piece(matrix).copy_(piece.matrix)
        matrix = self.sum(matrix)
        return matrix if dtype is None else matrix.to(dtype)

    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        self._check_rows(a, b)
        block = torch.zeros((b - a, self.shape[1]), dtype=self.dtype, device=self.device)
        for piece in self.pieces():
            first, last = max(a, piece.row), min(b, piece.row + piece.shape[0])
            if first < last:
                target = block[first - a : last - a, piece.column : piece.column + piece.shape[1]]
                target.copy_(piece.rows(first - piece.row, last - piece.row))
        block = self.sum(block)
        return block if dtype is None else block.to(dtype)

    def write(self, matrix: torch.Tensor) -> None:
        self._check_matrix(matrix)
        with writing(self.shards.local):
            for piece in self.pieces():
                piece.matrix.copy_(piece(matrix))

    def snapshot(self) -> torch.Tensor:
        return self.shards.local.clone()

    def restore(self, snapshot: torch.Tensor) -> None:
        with writing(self.shards.local):
            self.shards.local.copy_(snapshot)

    def key(self) -> tuple:
        """Equal to no other: what a process compares must not decide whether it joins the others in a sum."""
        return (object(),)
