# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""One pass of the norm's reuse, for all adapters of a model at once: a launch casts every A and B and takes a digest of
each pair, a second one brings norms and gains up to date where the digest says so. The host never waits."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .captured import CAPTURED_SLOT, SLOTS, Memory, advance, note_captured, tabulate
from .launch import INTERPRETED, Kernel
from .row_norm import PLAIN, Source, sum_squares
from .tiles import ceil_div, norm_tiles

# The columns of the table that tells the kernels where each member's tensors are; the first ones change when it moves.
A, B, MAGNITUDE = (tl.constexpr(i) for i in range(3))
WEIGHT, SCALE, CODE, OUTER, OUTER_CODE, OFFSET, ZERO, GROUP = (tl.constexpr(i) for i in range(3, 11))
SIZE_M, SIZE_K, SCALING = (tl.constexpr(i) for i in range(11, 14))
PLACES = range(14)
ELEMENTS_A, ELEMENTS_B, COPY_A, COPY_B, CAST_BLOCK, NORM_BLOCK = (tl.constexpr(i) for i in range(14, 20))
OUT, IN, STATS = (tl.constexpr(i) for i in range(20, 23))
COLUMNS = tl.constexpr(24)
_NOTHING = (None,) * 8  # pointers of no weight

ALIGNED = 16  # elements; so that every tensor in a shared buffer starts at a multiple of 16 bytes at least

LANGUAGE_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int32: tl.int32,
}


class Member(NamedTuple):
    """One adapter on one layer.

    Args:
        source: The base weight `[out, in]`; None where no norm is wanted.
        a, b: The parameters A `[r, in]` and B `[out, r]`, contiguous.
        magnitude: m `[out]`, contiguous; None where no gain is wanted.
        scaling: s.
    """

    source: Source | None
    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None
    scaling: float


@triton.jit
def mixed(b_x):
    """A bijection of 32 bits in which every bit of the input moves about half of the output's."""
    b_x ^= b_x >> 16
    b_x *= 0x7FEB352D
    b_x ^= b_x >> 15
    b_x *= 0x846CA68B
    return b_x ^ (b_x >> 16)


@triton.jit
def digest_of(b_value, o, m):
    """A 64-bit sum over a block that depends on each value's bits and on its place `o`; order is of no matter."""
    b_bits = b_value.to(tl.float32).to(tl.uint32, bitcast=True)
    b_one = mixed(b_bits ^ mixed(o.to(tl.uint32)))  # [BLOCK]
    b_two = mixed(b_one + 0x9E3779B9)
    b_both = (b_one.to(tl.int64) << 32) | b_two.to(tl.int64)
    return tl.sum(tl.where(m, b_both, 0), 0)


@triton.jit(do_not_specialize=["owners", "slot"])
def cast_fwd_kernel(
    table_ptr, copy_ptr, digest_ptr, owners, slot, members,
    SOURCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_member = tl.load(table_ptr + owners + i)
    p_row = table_ptr + i_member * COLUMNS
    block = i - tl.load(p_row + CAST_BLOCK)
    elements_a = tl.load(p_row + ELEMENTS_A)
    blocks_a = tl.cdiv(elements_a, BLOCK)
    is_b = block >= blocks_a
    o = tl.where(is_b, block - blocks_a, block) * BLOCK + tl.arange(0, BLOCK)
    m = o < tl.load(p_row + ELEMENTS_A + is_b)
    p_source = tl.load(p_row + A + is_b).to(tl.pointer_type(SOURCE))
    b_x = tl.load(p_source + o, mask=m, other=0.0)  # [BLOCK]
    if copy_ptr is not None:
        p_copy = copy_ptr + tl.multiple_of(tl.load(p_row + COPY_A + is_b), 16)
        b_x = b_x.to(copy_ptr.dtype.element_ty)
        tl.store(p_copy + o, b_x, mask=m)
    if digest_ptr is not None:
        b_sum = digest_of(b_x, o + is_b * elements_a, m)
        tl.atomic_add(digest_ptr + slot * members + i_member, b_sum, sem="relaxed")


@triton.jit(do_not_specialize=["owners", "slot"])
def norms_fwd_kernel(
    table_ptr, copy_ptr, digest_ptr, kept_ptr, stats_ptr, owners, slot, members, floor,
    FACTOR_TYPE: tl.constexpr, WEIGHT_TYPE: tl.constexpr, SCALE_TYPE: tl.constexpr, ZERO_TYPE: tl.constexpr,
    GROUP_TYPE: tl.constexpr, MAGNITUDE_TYPE: tl.constexpr, LAYOUT: tl.constexpr, EVEN_IN: tl.constexpr,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr,
    BITS: tl.constexpr, COUNT: tl.constexpr, ROUND: tl.constexpr,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_member = tl.load(table_ptr + owners + i)
    p_row = table_ptr + i_member * COLUMNS
    out_features = tl.load(p_row + OUT)
    in_features = tl.load(p_row + IN)
    if EVEN_IN:
        in_features = tl.multiple_of(in_features, 16)
    stats = tl.multiple_of(tl.load(p_row + STATS), 16)
    first = i - tl.load(p_row + NORM_BLOCK)
    o_m = first * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < out_features
    # The kept norm stands unless the digest of A and B is another one than at the last pass.
    b_norm = tl.zeros([BLOCK_M], dtype=tl.float32)
    stale = True
    kept = stats // (1 if MAGNITUDE_TYPE is None else 2)  # norms alone are kept
    if kept_ptr is not None:
        last = (slot + 2) % 3
        stale = tl.load(digest_ptr + slot * members + i_member) != tl.load(digest_ptr + last * members + i_member)
        b_norm = tl.load(kept_ptr + kept + o_m, mask=m_m, other=0.0)
    if digest_ptr is not None:
        tl.store(digest_ptr + (slot + 1) % 3 * members + i_member, tl.zeros([], dtype=tl.int64), mask=first == 0)
    if stale:
        if copy_ptr is not None:
            p_a = copy_ptr + tl.multiple_of(tl.load(p_row + COPY_A), 16)
            p_b = copy_ptr + tl.multiple_of(tl.load(p_row + COPY_B), 16)
        else:
            p_a = tl.load(p_row + A).to(tl.pointer_type(FACTOR_TYPE))
            p_b = tl.load(p_row + B).to(tl.pointer_type(FACTOR_TYPE))
        p_w = tl.load(p_row + WEIGHT).to(tl.pointer_type(WEIGHT_TYPE))
        if ALIGNED:
            p_w = tl.multiple_of(p_w, 16)
        p_scale = tl.load(p_row + SCALE).to(tl.pointer_type(SCALE_TYPE))
        p_code = tl.load(p_row + CODE).to(tl.pointer_type(tl.float32))
        p_outer = tl.load(p_row + OUTER).to(tl.pointer_type(tl.float32))
        p_outer_code = tl.load(p_row + OUTER_CODE).to(tl.pointer_type(tl.float32))
        p_offset = tl.load(p_row + OFFSET).to(tl.pointer_type(tl.float32))
        p_zero = tl.load(p_row + ZERO).to(tl.pointer_type(ZERO_TYPE))
        if GROUP_TYPE is None:
            p_group = None
        else:
            p_group = tl.load(p_row + GROUP).to(tl.pointer_type(GROUP_TYPE))
        scaling = tl.load(p_row + SCALING).to(tl.int32).to(tl.float32, bitcast=True)
        size_m = tl.load(p_row + SIZE_M)
        size_k = tl.load(p_row + SIZE_K)
        if LAYOUT == 0:
            size_k = 1
        if LAYOUT == 1:
            size_m = 1
        b_norm = tl.sqrt_rn(
            sum_squares(
                p_w, p_scale, p_code, p_outer, p_outer_code, p_offset, p_zero, p_group, p_a, p_b, o_m, scaling,
                out_features, in_features, size_m, size_k,
                FORMAT, BLOCKSIZE, NESTED, ROWS, BITS, COUNT, ROUND, RANK, BLOCK_M, BLOCK_K, BLOCK_R, STAGES,
            )
        )  # fmt: skip
        if kept_ptr is not None:
            tl.store(kept_ptr + kept + o_m, b_norm, mask=m_m)
    p_stats = stats_ptr + stats + o_m
    tl.store(p_stats, b_norm, mask=m_m)
    if MAGNITUDE_TYPE is not None:
        p_magnitude = tl.load(p_row + MAGNITUDE).to(tl.pointer_type(MAGNITUDE_TYPE))
        b_m = tl.load(p_magnitude + o_m, mask=m_m, other=0.0).to(tl.float32)
        b_gain = tl.where(b_norm == 0, 1.0, tl.div_rn(b_m, tl.where(b_norm == 0, 1.0, b_norm)))
        b_gain = tl.where(tl.abs(b_gain) < floor, floor, b_gain)
        tl.store(p_stats + out_features, b_gain, mask=m_m)


_cast_fwd = Kernel(cast_fwd_kernel)
_norms_fwd = Kernel(norms_fwd_kernel)


class Pass(NamedTuple):
    """The tensors of one pass, member by member.

    Args:
        copies: A and B in the products' dtype, alternating; None where the parameters have it already.
        stats: Norm and gain `[2, out]`, or the norm `[1, out]`, float32; None where no norm is wanted.
    """

    copies: Sequence[torch.Tensor] | None
    stats: Sequence[torch.Tensor] | None


class Batch:
    """Members that one pair of launches can serve, and what their last pass left on the device.

    Two digests that are equal for different values would let an old norm stand; with 64 bits that is not to be expected
    in any training. Values that come back (NaN as well) give the same digest, and the norm that they had.

    Args:
        members: All with one device, dtypes, rank, format of weight, and all with a magnitude or none.
        dtype: That of the products.
    """

    def __init__(self, members: Sequence[Member], dtype: torch.dtype) -> None:
        first = members[0]
        self.kind, self.shapes = kind_of(first, dtype), self.shapes_of(members)
        self.members = members
        self.dtype = dtype
        self.floor = 0.0
        self.device = first.a.device
        self.rank = first.a.shape[0]
        self.copied = first.a.dtype != dtype
        self.block = 64 if INTERPRETED else 4096
        pads = [-(-size // ALIGNED) * ALIGNED for member in members for size in (member.a.numel(), member.b.numel())]
        self.copy_offsets = [0, *accumulate(pads)]
        self.rows = 1 if first.magnitude is None else 2
        self.norms = first.source is not None
        self.stats_offsets = [
            0,
            *accumulate(-(-self.rows * member.b.shape[0] // ALIGNED) * ALIGNED for member in members),
        ]
        self.tiles = norm_tiles(self.rank, first.source.constants[0] if self.norms else PLAIN, dtype.itemsize)
        self.places: list | None = None
        self.aligned = True
        self._templates()
        self._share_out()
        self.forget()

    def forget(self) -> None:
        """Let the next pass compute every norm."""
        self.own: Memory | None = None
        self.captured: Memory | None = None
        self.stream: int | None = None
        self.slot = 0

    @staticmethod
    def shapes_of(members: Sequence[Member]) -> list[tuple[torch.Size, torch.Size]]:
        """What a batch has been cut for."""
        return [(member.a.shape, member.b.shape) for member in members]

    def move(self, members: Sequence[Member], floor: float = 0.0) -> None:
        """Serve members of the same shapes and kind that may lie elsewhere in memory.

        Where a weight or a scaling is another one, `forget` what the last pass left.

        Args:
            members: They.
            floor: Lift gains smaller than this to it.
        """
        self.members, self.floor = members, floor
        places = [place for member in members for place in _places(member)]
        if places != self.places:
            self.places = places
            if self.norms and self.launches and _are_aligned(members) != self.aligned:
                self.launches.clear()  # they were compiled for the other
            self._locate()

    def _templates(self) -> None:
        """Shapes, with the gaps between them, by which the shared buffers are cut up in one call."""

        def spread(tensors: list[torch.Tensor], offsets: list[int]) -> tuple[list[torch.Tensor], slice | None]:
            gaps = [offsets[i + 1] - offsets[i] - tensor.numel() for i, tensor in enumerate(tensors)]
            if not any(gaps):
                return tensors, None
            gap = [torch.empty(size, device="meta") for size in gaps]
            return [part for pair in zip(tensors, gap, strict=True) for part in pair], slice(None, None, 2)

        factors = [factor.detach() for member in self.members for factor in (member.a, member.b)]
        self.copy_cut = spread(factors, self.copy_offsets) if self.copied else None
        stats = [torch.empty((self.rows, member.b.shape[0]), device="meta") for member in self.members]
        self.stats_cut = spread(stats, self.stats_offsets) if self.norms else None

    def refresh(self, keep: bool = True) -> Pass:
        """Cast the factors and bring norms and gains up to date, in two launches.

        A pass that is being captured into a graph has a memory of its own, which its replays compare and bring up to date
        on the device. That has to be there before the capture, from a pass that was none; without one every replay
        computes every norm. Replays of graphs that hold passes of one batch must not overlap.

        Args:
            keep: Compare with the last pass, and let the next one compare with this.
        """
        capturing, stream = _stream(self.device)
        memory, slot = self._memory(capturing, stream) if keep else None, self.slot
        if capturing and memory is not None:
            slot = CAPTURED_SLOT
            note_captured(memory, self.table)
        digests, kept = memory or (None, None)
        copy = copies = None
        if self.copied:
            copy = torch.empty(self.copy_offsets[-1], dtype=self.dtype, device=self.device)
            copies = _cut(copy, self.copy_cut)
        if copy is not None or digests is not None:
            self._launch_cast(copy, digests, slot)
        if not self.norms:
            return Pass(copies, None)
        stats = torch.empty(self.stats_offsets[-1], dtype=torch.float32, device=self.device)
        if self.norm_blocks:
            self._launch_norms(copy, digests, kept, stats, slot)
        if memory is not None and capturing:
            advance(digests)
        elif memory is not None:
            self.slot = (slot + 1) % SLOTS
        return Pass(copies, _cut(stats, self.stats_cut))

    def _memory(self, capturing: bool, stream: int | None) -> Memory | None:
        """What the pass that begins now compares with; None where it compares with nothing."""
        if not self.norms or capturing:
            return self.captured
        if self.own is None or stream != self.stream:
            self.own, self.stream, self.slot = self._empty_memory(), stream, 0
            if self.captured is None:
                self.captured = self._empty_memory()
        return self.own

    def _empty_memory(self) -> Memory:
        digests = torch.zeros((SLOTS, len(self.members)), dtype=torch.int64, device=self.device)
        norms = torch.empty(self.stats_offsets[-1] // self.rows, dtype=torch.float32, device=self.device)
        return Memory(digests, norms)

    def _launch_cast(self, copy: torch.Tensor | None, digests: torch.Tensor | None, slot: int) -> None:
        key = "cast", digests is None, slot
        launch = self.launches.get(key)
        if launch is None:
            launch = _cast_fwd.prepare(
                (self.cast_blocks, 1, 1),
                (self.cast_owners, slot, len(self.members)),
                (LANGUAGE_TYPES[self.members[0].a.dtype], self.block),
                keep=(self.launches, key),
            )
        launch(self.table, copy, digests)

    def _launch_norms(
        self,
        copy: torch.Tensor | None,
        digests: torch.Tensor | None,
        kept: torch.Tensor | None,
        stats: torch.Tensor,
        slot: int,
    ) -> None:
        key = "norms", digests is None, slot, self.floor
        launch = self.launches.get(key)
        if launch is None:
            launch = _norms_fwd.prepare(
                (self.norm_blocks, 1, 1),
                (self.norm_owners, slot, len(self.members), self.floor),
                self._constants(),
                self.tiles.warps,
                self.tiles.stages,
                keep=(self.launches, key),
            )
        launch(self.table, copy, digests, kept, stats)

    def _share_out(self) -> None:
        """Write the part of the table that holds wherever the members lie: sizes, and which program serves which."""
        self.launches: dict = {}
        rows, cast_owners, norm_owners = [], [], []
        for i, member in enumerate(self.members):
            rows += self._row(i, member, len(cast_owners), len(norm_owners))
            blocks = sum(ceil_div(factor.numel(), self.block) for factor in (member.a, member.b))
            cast_owners += [i] * blocks
            norm_owners += [i] * ceil_div(member.b.shape[0], self.tiles.block_m) if self.norms else []
        self.cast_owners, self.cast_blocks = len(rows), len(cast_owners)
        self.norm_owners, self.norm_blocks = self.cast_owners + len(cast_owners), len(norm_owners)
        self.fixed = torch.tensor(rows + cast_owners + norm_owners, dtype=torch.int64)

    def _row(self, i: int, member: Member, cast_block: int, norm_block: int) -> list[int]:
        row = {
            ELEMENTS_A: member.a.numel(),
            ELEMENTS_B: member.b.numel(),
            COPY_A: self.copy_offsets[2 * i],
            COPY_B: self.copy_offsets[2 * i + 1],
            CAST_BLOCK: cast_block,
            NORM_BLOCK: norm_block,
            OUT: member.b.shape[0],
            IN: member.a.shape[1],
            STATS: self.stats_offsets[i],
        }
        entries = {column.value: value for column, value in row.items()}
        return [entries.get(column, 0) for column in range(COLUMNS.value)]

    def _locate(self) -> None:
        """Make the table that tells the kernels where everything is; who was told of the old one still has it."""
        capturing = _stream(self.device)[0]
        pinned = self.device.type == "cuda" and not capturing
        table = torch.empty_like(self.fixed, pin_memory=pinned).copy_(self.fixed)
        rows = table[: self.cast_owners].view(len(self.members), COLUMNS.value)
        rows[:, : len(PLACES)] = torch.tensor(self.places).view(len(self.members), len(PLACES))
        if capturing:
            self.table = tabulate(rows.flatten().tolist(), table[self.cast_owners :].tolist(), self.device)
            self.places = None  # outside of the graph there is nothing in this table
            return
        self.pinned = table
        self.table = table.to(self.device, non_blocking=True)

    def _constants(self) -> tuple:
        first = self.members[0]
        source = first.source

        def type_of(tensor: torch.Tensor | None) -> tl.dtype | None:
            return None if tensor is None else LANGUAGE_TYPES[tensor.dtype]

        data, scale, _, _, _, _, zero, group = source.pointers
        self.aligned = _are_aligned(self.members)
        return (
            LANGUAGE_TYPES[self.dtype if self.copied else first.a.dtype],
            type_of(data),
            type_of(scale) or tl.float32,
            type_of(zero) or tl.float32,
            type_of(group),
            type_of(first.magnitude),
            layout_of(source),
            all(member.a.shape[1] % 16 == 0 for member in self.members),
            self.aligned,
            *source.constants,
            self.rank,
            self.tiles.block_m,
            self.tiles.block_k,
            self.tiles.block_r,
            self.tiles.stages if self.rank > self.tiles.block_r else None,
        )


def _are_aligned(members: Sequence[Member]) -> bool:
    """Whether every weight begins at a multiple of 16 bytes."""
    return all(member.source.pointers[0].data_ptr() % 16 == 0 for member in members)


def _places(member: Member) -> list[int]:
    """The columns `PLACES` of a member's row."""
    source = member.source
    pointers, sizes = (source.pointers, source.sizes) if source is not None else (_NOTHING, (0, 0))
    tensors = member.a, member.b, member.magnitude, *pointers
    scaling = int.from_bytes(struct.pack("<f", member.scaling), "little", signed=True)
    return [*(0 if tensor is None else tensor.data_ptr() for tensor in tensors), *sizes, scaling]


def kind_of(member: Member, dtype: torch.dtype) -> tuple:
    """What members of one batch have in common."""
    source, magnitude = member.source, member.magnitude
    kind = (member.a.device, member.a.dtype, dtype, None if magnitude is None else magnitude.dtype)
    if source is None:
        return kind
    types = tuple(None if pointer is None else pointer.dtype for pointer in source.pointers)
    return (*kind, member.a.shape[0], source.constants, types, layout_of(source))


def layout_of(source: Source) -> int:
    """Which stride of a plain weight is one: the columns' (0), the rows' (1), none (2)."""
    if source.constants[0] != PLAIN:
        return 2
    return 0 if source.sizes[1] == 1 else 1 if source.sizes[0] == 1 else 2


def row_norm(source: Source, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The Triton body of `peft.dora.row_norm`, in one launch.

    Args:
        source: The base weight `[out, in]`.
        a, b: `[r, in]` and `[out, r]` in one dtype.
        scaling: s.

    Returns:
        `[out]` float32.
    """
    members = [Member(source, a.contiguous(), b.contiguous(), None, scaling)]
    batch = Batch(members, a.dtype)
    batch.move(members)
    return batch.refresh(keep=False).stats[0][0]


def _cut(flat: torch.Tensor, cut: tuple[list[torch.Tensor], slice | None]) -> Sequence[torch.Tensor]:
    templates, wanted = cut
    parts = torch._C._nn.unflatten_dense_tensors(flat, templates)
    return parts if wanted is None else parts[wanted]


def _stream(device: torch.device) -> tuple[bool, int | None]:
    """Whether a graph is being captured, and the stream: what another one wrote may not be there yet."""
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return torch._C._cuda_isCurrentStreamCapturing(), torch._C._cuda_getCurrentRawStream(index)
    return False, None
