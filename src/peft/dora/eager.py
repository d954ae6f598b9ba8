# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The PyTorch bodies of the passes over the output: what the Triton kernels in `kernels/compose.py` do, for any device
and dtype."""

from __future__ import annotations

import torch

from .norm import CHUNK_BYTES
from .reference import over_norm


def compose(
    u: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    *,
    stats: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    scaling: float,
    keep_v: bool = False,
    launches: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y = g∘v + bias with v = u + s·(h bᵀ + c), written over u.

    Args:
        u: The base product `[..., out]` without bias, contiguous; overwritten.
        h: x Aᵀ `[..., r]`.
        b: B `[out, r]`, in h's dtype.
        stats: The norm and the gain g, `[2, out]`; None for y = v.
        bias: `[out]`; only with a gain.
        lora_bias: c `[out]`.
        scaling: s.
        keep_v: Also return v, and write y elsewhere; only with a gain.
        launches: Where the Triton body keeps what it worked out for a shape.

    Returns:
        y `[..., out]` in u's dtype, and v or None.
    """
    shape = u.shape
    u, h = u.view(-1, shape[-1]), h.reshape(-1, h.shape[-1])
    c = None if lora_bias is None else lora_bias.detach() * scaling
    if stats is None:
        v = _with_branch(u, h, b, c, scaling, in_place=h.dtype == u.dtype)
        return v.to(u.dtype).view(shape), None
    wide, gain = stats.dtype, stats[1]
    y = torch.empty_like(u) if keep_v else u
    kept = None
    if keep_v:
        kept = u if h.dtype == u.dtype else torch.empty_like(u, dtype=h.dtype)
    shift = None if bias is None else bias.detach().to(wide)
    b = b.to(wide)
    # Rounded between its two sums, a branch smaller than u's last digit would be lost, and what m learns with it.
    rows = max(1, len(u) if u.dtype == wide else CHUNK_BYTES // (2 * wide.itemsize * max(len(gain), 1)))
    for start in range(0, len(u), rows):
        part = slice(start, start + rows)
        v = _with_branch(u[part].to(wide), h[part].to(wide), b, c, scaling, in_place=True)
        if kept is not None:
            kept[part] = v
        if shift is None:
            torch.mul(v, gain, out=y[part])
        else:
            torch.addcmul(shift, v, gain, out=y[part])
    return y.view(shape), None if kept is None else kept.view(shape)


def _with_branch(
    u: torch.Tensor, h: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, scaling: float, in_place: bool
) -> torch.Tensor:
    """u + s·h bᵀ + c, in h's dtype."""
    v = u.addmm_(h, b.t(), alpha=scaling) if in_place else torch.addmm(u.to(h.dtype), h, b.t(), alpha=scaling)
    return v if c is None else v.add_(c)


def scale_gradient(
    dy: torch.Tensor,
    *,
    stats: torch.Tensor,
    kept: torch.Tensor | None,
    kept_is_v: bool,
    dtype: torch.dtype | None,
    h: torch.Tensor | None = None,
    scaling: float = 1.0,
    b_dtype: torch.dtype | None = None,
    launches: dict | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """t = g∘dy, the magnitude's gradient dm = Σ_tokens dy∘v / norm, and dB = s·tᵀh where it costs little more.

    Args:
        dy: `[..., out]`, contiguous.
        stats: The norm and the gain g, `[2, out]`.
        kept: v, or y = g∘v from which v is read back; None where dm is not wanted.
        kept_is_v: Which of the two.
        dtype: That of t; None where t is not wanted.
        h: x Aᵀ `[..., r]`; None where dB is not wanted.
        scaling: s.
        b_dtype: That of dB.
        launches: As in `compose`.

    Returns:
        t `[tokens, out]`, dm `[out]` in the dtype of stats and dB `[out, r]`; None for what is not wanted, and for a dB
        that is better made by a product of its own, which here is any.
    """
    norm, gain = stats
    dy = dy.view(-1, dy.shape[-1])
    kept = None if kept is None else kept.reshape(dy.shape)
    t = None
    if dtype is not None:
        t = torch.mul(dy, gain, out=torch.empty_like(dy, dtype=dtype))
    if kept is None:
        return t, None, None
    total = torch.zeros_like(norm)
    rows = max(1, CHUNK_BYTES // (3 * norm.itemsize * max(len(norm), 1)))
    for start in range(0, len(dy), rows):
        block = dy[start : start + rows].to(norm.dtype) * kept[start : start + rows]
        total += block.sum(0)
    return t, over_norm(total, norm, None if kept_is_v else gain), None


class DenseWeight:
    """A matrix `[out, in]` in the clothes of `peft.weights.BaseWeight`, as far as this package asks.

    Args:
        matrix: Of a floating dtype, in any layout.
        bias: `[out]`, or None.
    """

    format = "plain"

    def __init__(self, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.matrix = matrix.detach()
        self.bias = bias
        self.shape = tuple(matrix.shape)
        self.dtype = matrix.dtype
        self.device = matrix.device

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The matrix, a view where no conversion is needed."""
        return self.matrix if dtype is None else self.matrix.to(dtype)

    def rows(self, a: int, b: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows a to b, `[b - a, in]`."""
        rows = self.matrix[a:b]
        return rows if dtype is None else rows.to(dtype)

    def packed(self) -> None:
        """Nothing is packed here."""

    def has_key(self, key: tuple) -> bool:
        """Whether the bytes are those that had this key."""
        return self.key() == key

    def key(self) -> tuple:
        """Identity of the stored bytes."""
        return id(self.matrix), self.matrix.data_ptr(), self.matrix._version, self.matrix.dtype
