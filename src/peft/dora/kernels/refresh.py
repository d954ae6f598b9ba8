# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""One pass of the norm's reuse on the device: cast A and B, compare them with the last pass's values in the same
launch, and let the norm kernel return what it had where nothing differs. The host never waits for the answer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED, Kernel
from .row_norm import Source, launch_row_norm
from .tiles import ceil_div


@triton.jit
def copy_block(src_ptr, old_ptr, new_ptr, changed_ptr, epoch, i, elements, BLOCK: tl.constexpr):
    """Cast one block; where a value is not the old one, leave the epoch in `changed`."""
    o = i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < elements
    b_new = tl.load(src_ptr + o, mask=m, other=0.0).to(new_ptr.dtype.element_ty)  # [BLOCK]
    tl.store(new_ptr + o, b_new, mask=m)
    if changed_ptr is not None:
        b_old = tl.load(old_ptr + o, mask=m, other=0.0)
        differs = tl.max((b_new != b_old).to(tl.int32), 0)
        tl.store(changed_ptr, epoch, mask=differs > 0)


@triton.jit(do_not_specialize=["epoch"])
def snapshot_fwd_kernel(
    a_ptr, b_ptr, a_old_ptr, b_old_ptr, a_new_ptr, b_new_ptr, changed_ptr, epoch, elements_a, elements_b,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    blocks_a = tl.cdiv(elements_a, BLOCK)
    if i < blocks_a:
        copy_block(a_ptr, a_old_ptr, a_new_ptr, changed_ptr, epoch, i, elements_a, BLOCK)
    else:
        copy_block(b_ptr, b_old_ptr, b_new_ptr, changed_ptr, epoch, i - blocks_a, elements_b, BLOCK)


_snapshot_fwd = Kernel(snapshot_fwd_kernel, free=1)


class DeviceState(NamedTuple):
    """What the next pass compares with.

    Args:
        key: What the host compares: weight, scaling, shapes, dtype, device, stream.
        a, b: The factors' values in the dtype of the products.
        stats: `[1 or 2, out]`, their norm in the first row.
        changed: int32 on the device, the last pass at which a or b changed.
        epoch: The number of the last pass.
    """

    key: tuple
    a: torch.Tensor
    b: torch.Tensor
    stats: torch.Tensor
    changed: torch.Tensor
    epoch: int


LAST_EPOCH = 2**31 - 2


class Refreshed(NamedTuple):
    """The tensors of one pass, and what the next one compares with (None: what it would have compared with before).

    Args:
        a, b: The factors in the dtype of the products.
        stats: Norm and gain `[2, out]`, or the norm `[1, out]`; float32.
        state: For the next pass.
    """

    a: torch.Tensor
    b: torch.Tensor
    stats: torch.Tensor
    state: DeviceState | None


def refresh(
    state: object,
    key: tuple,
    source: Source,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
    magnitude: torch.Tensor | None,
    floor: float,
) -> Refreshed:
    """Cast A and B and bring the norm up to date, in two launches.

    A pass that is being captured into a graph computes the norm and leaves no state: when the graph is replayed nothing
    on the host says what happened since.

    Args:
        state: What the last pass left.
        key: What the host knows of weight, scaling, shapes, dtypes and device.
        source: The base weight.
        A, B: The parameters.
        scaling: s.
        dtype: That of the products.
        magnitude: m `[out]`, or None where no gain is wanted.
        floor: Lift gains smaller than this to it.
    """
    capturing, stream = _stream(A)
    key = (*key, stream)
    if isinstance(state, DeviceState) and state.key == key and state.epoch < LAST_EPOCH and not capturing:
        changed, epoch = state.changed, state.epoch + 1
        old_a, old_b, old = state.a, state.b, state.stats
    else:
        changed = old_a = old_b = old = None
        epoch = 0
    a, b = torch.empty(A.shape, dtype=dtype, device=A.device), torch.empty(B.shape, dtype=dtype, device=B.device)
    block = 64 if INTERPRETED else 2048
    _snapshot_fwd(
        (ceil_div(a.numel(), block) + ceil_div(b.numel(), block), 1, 1),
        (A.contiguous(), B.contiguous(), old_a, old_b, a, b, changed),
        (epoch, a.numel(), b.numel()),
        (block,),
    )
    rows = 1 if magnitude is None else 2
    stats = torch.empty((rows, B.shape[0]), dtype=torch.float32, device=A.device)
    if magnitude is not None:
        magnitude = magnitude.contiguous()
    launch_row_norm(
        source, a, b, scaling, stats, old=old, changed=changed, epoch=epoch, magnitude=magnitude, floor=floor
    )
    if capturing:
        return Refreshed(a, b, stats, None)
    if changed is None:
        changed = torch.zeros((), dtype=torch.int32, device=A.device)
    return Refreshed(a, b, stats, DeviceState(key, a, b, stats, changed, epoch))


def _stream(tensor: torch.Tensor) -> tuple[bool, int | None]:
    """Whether a graph is being captured, and the stream: what another one wrote may not be there yet."""
    if tensor.device.type == "cuda":
        return torch._C._cuda_isCurrentStreamCapturing(), torch._C._cuda_getCurrentRawStream(tensor.get_device())
    return False, torch.xpu.current_stream().sycl_queue if tensor.device.type == "xpu" else None
