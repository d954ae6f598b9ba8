# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Weights that bitsandbytes keeps in 4 bits (NF4, FP4; arXiv 2305.14314) or 8 bits (LLM.int8(); arXiv 2208.07339).
This module needs only tensors until one of its weights is read; bitsandbytes is imported then."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import nn

from .base import Packed, SameObject, bears, comes_and_goes, held_parameter, overwrite, untouched
from .formats import Format, register
from .sharded import Piece, ShardedWeight, pieces_of_run
from .stored import MaybePlainWeight, no_dispatch


class _Quantised(MaybePlainWeight):
    """What the two formats share: until the layer is moved to a device its weight is a plain floating one."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def is_plain(self) -> bool:
        return self._stored() is None

    @abstractmethod
    def _stored(self) -> Any:
        """What the format keeps beside the weight's bytes, or None where the weight is not quantised."""


class _State4bit(NamedTuple):
    data: torch.Tensor
    quant_state: Any


class Weight4bit(_Quantised):
    """The weight of a bitsandbytes `Linear4bit`: NF4 or FP4, any block size, nested statistics or not, in any storage
    dtype, and the layout with interleaved rows that bitsandbytes rewrites it to in eval on CPUs with AVX512-BF16.

    `direct()` is False on the CPU where the number of input features is no multiple of the block size: bitsandbytes
    0.50 computes another product there than the one its bytes say.
    """

    format = "bnb 4bit"

    def _stored(self) -> Any:
        return quant_state_of(self.layer.weight, self.layer)

    @property
    def dtype(self) -> torch.dtype:
        state = self._stored()
        return self.layer.weight.dtype if state is None else getattr(state, "original_dtype", state.dtype)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return self.layer.compute_dtype

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        state = self._stored()
        if state is None:
            return self.plain.dense(dtype)
        matrix = dequantise_4bit(self.layer.weight, state)
        return matrix if dtype is None else matrix.to(dtype)

    def _read(self, a: int, b: int) -> torch.Tensor:
        state = self._stored()
        return (_read_interleaved if _is_interleaved(state) else _read_rows)(self.layer.weight, state, a, b)

    def _write(self, matrix: torch.Tensor) -> None:
        state = self._stored()
        import bitsandbytes.functional as bnb

        weight = self.layer.weight
        nested = getattr(state, "original_nested", state.nested) if _is_interleaved(state) else state.nested
        storage = getattr(state, "original_storage_type", None) or weight.dtype
        # bitsandbytes quantises fp32, fp16 and bf16; fp32 input keeps every bit of the matrix up to the rounding.
        packed, fresh = bnb.quantize_4bit(
            matrix.detach().to(weight.device, torch.float32).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=nested,
            quant_type=state.quant_type,
            quant_storage=storage,
        )
        fresh.dtype = self.dtype
        self._take(packed, fresh)

    def _snapshot(self) -> _State4bit:
        data = self.layer.weight.detach().clone().as_subclass(torch.Tensor)
        return _State4bit(data, copy.deepcopy(self._stored()))

    def _restore(self, snapshot: _State4bit) -> None:
        device = self.device
        state = copy.deepcopy(snapshot.quant_state)
        state.to(device)
        self._take(snapshot.data.to(device), state)

    def tensors(self) -> dict[str, torch.Tensor]:
        state = self._stored()
        held = {"weight": self.layer.weight}
        return held if state is None else {**held, "absmax": state.absmax}

    def key(self) -> tuple:
        if comes_and_goes(self.layer):
            return (object(),)
        state = self._stored()
        return None if state is None else SameObject(state), *super().key()

    def has_key(self, key: tuple) -> bool:
        if comes_and_goes(self.layer):
            return False
        with no_dispatch():
            weight = self.layer.weight
            state = quant_state_of(weight, self.layer)
            if state is None or len(key) < 3:
                return self.key() == key
            return key[0]._ref() is state and bears(weight, key[1]) and bears(state.absmax, key[2])

    def reader_of_shards(self) -> type | None:
        """Until it is quantised the layer holds a plain weight."""
        return None if getattr(self.layer, "quant_state", None) is None else ShardedWeight4bit

    def packed(self) -> Packed | None:
        state = self._stored()
        if state is None or _is_interleaved(state):
            return None
        nested = None
        if state.nested:
            nested = (state.state2.absmax, state.state2.code, state.state2.blocksize, state.offset)
        return Packed(
            kind=state.quant_type,
            data=_bytes(self.layer.weight),
            shape=self.shape,
            dtype=self.dtype,
            blocksize=state.blocksize,
            code=state.code,
            absmax=state.absmax,
            nested=nested,
        )

    def direct(self) -> bool:
        layer = self.layer
        weight, state = layer.weight, self._stored()
        kind = type(layer)
        forward = kind.__dict__.get("forward")
        return (
            (kind.__module__, kind.__qualname__) == ("bitsandbytes.nn.modules", "Linear4bit")
            and getattr(forward, "__module__", None) == "bitsandbytes.nn.modules"
            and state is not None
            and _reads_right(weight.device, state)
            and untouched(layer, weight, type(weight) if _is_params4bit(weight) else nn.Parameter)
        )

    def _take(self, packed: torch.Tensor, state: Any) -> None:
        weight = self.layer.weight
        held = overwrite(weight.detach(), packed)
        if held.data_ptr() != weight.data_ptr():
            weight.data = held
        if _is_params4bit(weight):
            weight.quant_state = state
        self.layer.quant_state = state


class _State8bit(NamedTuple):
    data: torch.Tensor
    scb: torch.Tensor


class Weight8bit(_Quantised):
    """The weight of a bitsandbytes `Linear8bitLt`: int8 rows and the largest magnitude (SCB) of each.

    bitsandbytes holds the two on the parameter until the first forward, on `layer.state` from then on, and, after a
    move through a parent module, the bytes on the one and the statistics on the other. With `has_fp16_weights=True`
    the weight stays a plain floating one, which the layer quantises as it goes.
    """

    format = "bnb 8bit"

    def _stored(self) -> _State8bit | None:
        return int8_state_of(self.layer.weight, self.layer.state)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype if self._stored() is None else torch.float32

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        stored = self._stored()
        return self.plain.dense(dtype) if stored is None else dequantise_8bit(*stored, dtype)

    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        self._check_rows(a, b)
        stored = self._stored()
        if stored is None:
            return self.plain.rows(a, b, dtype)
        return dequantise_8bit(stored.data[a:b], stored.scb[a:b], dtype)

    def _read(self, a: int, b: int) -> torch.Tensor:
        return self.rows(a, b)

    def write(self, matrix: torch.Tensor) -> None:
        super().write(matrix)
        self._forget_copy()

    def _forget_copy(self) -> None:
        """The int8 copy of a plain weight that the last forward left behind is out of date; eval would go on using it."""
        if self.is_plain:
            self.layer.state.reset_grads()

    def _write(self, matrix: torch.Tensor) -> None:
        """The rows are rounded to int8 symmetrically, each by its own largest magnitude."""
        wide = matrix.detach().to(self.device, torch.float32)
        scb = wide.abs().amax(dim=1)
        scale = torch.where(scb > 0, 127.0 / scb, 0.0)
        self._take(_State8bit((wide * scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scb))

    def _snapshot(self) -> _State8bit:
        stored = self._stored()
        return _State8bit(stored.data.clone(), stored.scb.clone())

    def restore(self, snapshot: _State8bit | torch.Tensor) -> None:
        super().restore(snapshot)
        self._forget_copy()

    def _restore(self, snapshot: _State8bit) -> None:
        self._take(_State8bit(*(tensor.to(self.device) for tensor in snapshot)))

    def tensors(self) -> dict[str, torch.Tensor]:
        weight, state = self.layer.weight, self.layer.state
        held = {"weight": weight}
        if not weight.is_floating_point():
            held["CB"] = weight.CB if weight.CB is not None else state.CB
            held["SCB"] = weight.SCB if weight.SCB is not None else state.SCB
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def packed(self) -> Packed | None:
        stored = self._stored()
        if stored is None:
            return None
        return Packed(kind="int8", data=stored.data, shape=self.shape, dtype=self.dtype, scb=stored.scb)

    def _take(self, new: _State8bit) -> None:
        weight, state = self.layer.weight, self.layer.state
        held = self._stored()
        data, scb = overwrite(held.data, new.data), overwrite(held.scb, new.scb)
        if data.data_ptr() != weight.data_ptr():
            weight.data = data
        holder = weight if weight.CB is not None else state
        holder.CB, holder.SCB = data, scb


class ShardedWeight4bit(ShardedWeight):
    """A 4-bit weight whose packed bytes are spread over processes. It can be read, not written."""

    format = "sharded bnb 4bit"

    @property
    def _state(self) -> Any:
        return quant_state_of(held_parameter(self.layer, "weight"), self.layer)

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self._state.dtype

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return self.layer.compute_dtype

    @property
    def lossy(self) -> bool:
        return True

    def pieces(self) -> list[Piece]:
        local, start = self.shards.local, self.shards.start
        entry = start if isinstance(start, int) else start[0]  # the packed bytes are one column
        run = _read_run(_bytes(local), 2 * entry * local.element_size(), self._state)
        return pieces_of_run(run, 2 * entry * local.element_size(), self.shape[1])

    def write(self, matrix: torch.Tensor) -> None:
        raise RuntimeError(
            "write(matrix) to a 4-bit weight in shards: blocks that share a scale lie on several processes. Gather the "
            "model (for example with FSDP.summon_full_params), or merge the adapter on one process."
        )


def _is_params4bit(weight: torch.Tensor) -> bool:
    return type(weight).__name__ == "Params4bit"


def quant_state_of(weight: torch.Tensor, layer: nn.Module | None = None) -> Any:
    """The `QuantState` of a 4-bit weight, or None where it is not quantised (yet).

    FSDP replaces the parameter by one of another class and loses its state; the layer still has it.
    """
    state = getattr(weight, "quant_state", None)
    if state is None and not _is_params4bit(weight):
        state = getattr(layer, "quant_state", None)
    return state


def int8_state_of(weight: torch.Tensor, state: Any) -> _State8bit | None:
    """The int8 rows [out, in] and SCB [out] that an 8-bit layer computes with; None where the weight is floating.

    Args:
        weight: The `Int8Params`.
        state: The layer's `MatmulLtState`, or None.

    Raises:
        ValueError: The weight is int8, but its statistics are neither on it nor in `state`.
    """
    if weight.is_floating_point():
        return None
    on_weight = getattr(weight, "CB", None), getattr(weight, "SCB", None)
    on_state = getattr(state, "CB", None), getattr(state, "SCB", None)
    data = next((tensor for tensor in (on_weight[0], on_state[0]) if tensor is not None), weight.detach())
    scb = next((tensor for tensor in (on_weight[1], on_state[1]) if tensor is not None), None)
    if scb is None:
        raise ValueError(
            "an int8 weight of bitsandbytes without its row statistics (SCB): pass `state=layer.state`; after the first "
            "forward the statistics are kept there"
        )
    if data.device != weight.device:
        data = weight.detach()
    return _State8bit(data.as_subclass(torch.Tensor), scb.to(data.device))


def dequantise_4bit(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """The matrix [out, in] of a 4-bit weight in the dtype that was quantised; `code[i] * absmax`, rounded once."""
    if _is_interleaved(state):
        return _read_interleaved(weight, state, 0, state.shape[0])
    if not _reads_right(weight.device, state):
        return _read_rows(weight, state, 0, state.shape[0])
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(_bytes(weight).view(-1, 1), state)


def dequantise_8bit(data: torch.Tensor, scb: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """int8 rows [n, in] times `scb / 127` [n], computed in float32 (float64 for float64) and rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    matrix = data.to(wide).mul_((scb.to(wide) / 127.0)[:, None])
    return matrix if dtype is None else matrix.to(dtype)


def _bytes(weight: torch.Tensor) -> torch.Tensor:
    """The packed bytes as flat uint8, whatever dtype they are stored under."""
    data = weight.detach()
    if not torch.compiler.is_compiling():  # Dynamo drops the class by itself and knows no `as_subclass`
        data = data.as_subclass(torch.Tensor)
    return data.reshape(-1).view(torch.uint8)


def _reads_right(device: torch.device, state: Any) -> bool:
    """False where bitsandbytes 0.50 on the CPU lets the blocks start anew in each row although they run on: there the
    layer's own product is wrong too, and only one flat row is read as it was written."""
    return device.type != "cpu" or state.shape[-1] % state.blocksize == 0


def _scales(state: Any, first: int, last: int) -> torch.Tensor:
    """Float32 scales of the blocks first to last."""
    absmax = state.absmax[first:last]
    if not state.nested:
        return absmax
    outer = torch.arange(first, last, device=absmax.device) // state.state2.blocksize
    return state.state2.code[absmax.int()] * state.state2.absmax[outer] + state.offset


def _read_rows(weight: torch.Tensor, state: Any, a: int, b: int) -> torch.Tensor:
    """Rows a to b, [b - a, in], from the blocks that cover them."""
    import bitsandbytes.functional as bnb

    out, features = state.shape
    size = state.blocksize
    start, stop = a * features, b * features
    if start == stop:
        return torch.empty((b - a, features), dtype=state.dtype, device=weight.device)
    first, last = start // size, -(-stop // size)
    end = min(last * size, out * features)
    cover = _part_of_state(state, first, last, [b - a, features] if features % size == 0 else [end - first * size])
    flat = bnb.dequantize_4bit(_bytes(weight)[first * size // 2 : -(-end // 2)].view(-1, 1), cover).reshape(-1)
    return flat[start - first * size : stop - first * size].view(b - a, features)


def _read_run(data: torch.Tensor, start: int, state: Any) -> torch.Tensor:
    """The entries, in row-major order, that a run of packed bytes holds; `start` counts entries before it."""
    import bitsandbytes.functional as bnb

    size = state.blocksize
    stop = min(start + 2 * len(data), state.shape.numel())
    if stop <= start:
        return torch.empty(0, dtype=state.dtype, device=data.device)
    first = start // size
    lead = start - first * size  # even: a byte is never split
    padded = torch.cat((data.new_zeros(lead // 2), data))[: -(-(stop - first * size) // 2)]
    cover = _part_of_state(state, first, -(-stop // size), [stop - first * size])
    return bnb.dequantize_4bit(padded.view(-1, 1), cover).reshape(-1)[lead:]


def _part_of_state(state: Any, first: int, last: int, shape: list[int]) -> Any:
    """The `QuantState` of blocks first to last alone, that hold a matrix or vector of this shape."""
    import bitsandbytes.functional as bnb

    return bnb.QuantState(
        absmax=_scales(state, first, last),
        shape=torch.Size(shape),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )


_INTERLEAVED_ROWS = 32


def _is_interleaved(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _read_interleaved(weight: torch.Tensor, state: Any, a: int, b: int) -> torch.Tensor:
    """Rows a to b, [b - a, in], of the layout for AVX512-BF16.

    There 32 rows are stored together: for each pair of columns 32 bytes, whose low halves are the pairs of the first 16
    rows and whose high halves are those of the last 16. The scales are bf16 [in / blocksize, out].
    """
    out, features = state.shape
    size = _INTERLEAVED_ROWS
    first, last = a // size, -(-b // size)
    stored = _bytes(weight).view(out // size, features // 2, size)[first:last]
    codes = torch.cat([stored & 0xF, stored >> 4], dim=-1).view(last - first, features // 2, size, 2)
    codes = codes.transpose(1, 2).reshape((last - first) * size, features)[a - first * size : b - first * size]
    scales = state.absmax[:, a:b].T.float()
    matrix = state.code[codes.int()].view(b - a, features // state.blocksize, state.blocksize) * scales[:, :, None]
    return matrix.view(b - a, features).to(state.original_dtype)


register(
    Format("bitsandbytes 4 bit (NF4, FP4)", Weight4bit, ("bitsandbytes.nn.modules.Linear4bit",), verified="CPU, GPU"),
    Format("bitsandbytes 8 bit", Weight8bit, ("bitsandbytes.nn.modules.Linear8bitLt",), verified="CPU, GPU"),
)
