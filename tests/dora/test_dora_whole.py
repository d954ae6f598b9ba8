# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A layer's passes in one launch each way, against float64, and where they are made so."""

import itertools

import pytest
import torch
from dora_truth import check, make_case, quantised
from test_dora_beside import low_dtypes

from peft.dora import NormCache

# tokens, out, in, rank: no multiples of any tile, single rows and columns, several tiles (a GPU's are larger)
SHAPES = [(1, 1, 1, 1), (7, 40, 24, 3), (50, 70, 90, 5), (33, 130, 64, 16), (70, 10, 200, 17), (37, 100, 130, 32)]


def drawn(shape, dtype, device, seed=0):
    tokens, out, features, rank = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes, scale=1.0, kind=dtype):
        return (torch.randn(*sizes, generator=generator) * scale).to(device, kind)

    x, W, t = draw(tokens, features), draw(out, features, scale=features**-0.5), draw(tokens, out)
    a, b = draw(rank, features, scale=features**-0.5), draw(out, rank, scale=0.5)
    stats = draw(2, out, kind=torch.float32).abs() + 0.5
    return x, W, a, b, t, stats, draw(out, kind=torch.float32), draw(out)


def close(found, truth, steps=1.0):
    """To `steps` roundings of the largest value: sums are in float32."""
    step = torch.finfo(found.dtype).eps * steps if found.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(found.double(), truth, rtol=step, atol=float(truth.abs().max()) * step)


def by_rows(W):
    """The same matrix with room between its rows."""
    wide = W.new_full((W.shape[0], 2 * W.shape[1]), float("nan"))
    wide[:, : W.shape[1]] = W
    return wide[:, : W.shape[1]]


def shapes(body):
    return (
        SHAPES
        if body.name == "interpreter"
        else [*SHAPES, (1, 257, 700, 8), (300, 600, 520, 12), (640, 1030, 300, 16)]
    )


@pytest.mark.parametrize("scaling", [2.0, -0.3])
@pytest.mark.parametrize("extra", [False, True], ids=["gain", "all"])
def test_forward(body, scaling, extra):
    dtypes = low_dtypes(body)
    from peft.dora import kernels

    for dtype, shape in itertools.product(dtypes, shapes(body)):
        x, W, a, b, _, stats, c, bias = drawn(shape, dtype, body.device)
        y, h, v = kernels.whole_fwd(
            x, by_rows(W), a, b, stats=stats, bias=bias if extra else None, lora_bias=c if extra else None,
            scaling=scaling, keep_v=extra, launches={},
        )  # fmt: skip
        truth_h = x.double() @ a.double().t()
        close(h, truth_h, 0.51)
        truth_v = x.double() @ W.double().t() + scaling * (
            h.double() @ b.double().t() + (c.double() if extra else 0.0)
        )
        truth = stats[1].double() * truth_v + (bias.double() if extra else 0.0)
        close(y, truth, 0.51)
        assert (v is None) == (not extra)
        if extra:
            close(v, truth_v, 0.51)


def test_without_gain(body):
    dtypes = low_dtypes(body)
    from peft.dora import kernels

    for dtype in dtypes:
        x, W, a, b, *_, bias = drawn(SHAPES[2], dtype, body.device)
        y, h, _ = kernels.whole_fwd(
            x.view(5, 10, -1), W, a, b, stats=None, bias=bias, lora_bias=None, scaling=0.5, launches={}
        )
        assert y.shape == (5, 10, 70)
        assert h.shape == (5, 10, 5)
        truth = x.double() @ W.double().t() + 0.5 * h.view(50, 5).double() @ b.double().t() + bias.double()
        close(y.view(50, 70), truth, 0.51)


@pytest.mark.parametrize("a_dtype", [torch.float32, None], ids=["float32", "low"])
def test_backward(body, a_dtype):
    dtypes = low_dtypes(body)
    from peft.dora import kernels

    for dtype, shape in itertools.product(dtypes, shapes(body)):
        x, W, a, b, t, *_ = drawn(shape, dtype, body.device)
        launches = {}
        for _ in range(2):  # the counters are back at zero
            dx, da = kernels.whole_bwd(t, by_rows(W), x, a, b, 0.75, a_dtype or dtype, launches)
        dh = (0.75 * t.double() @ b.double()).to(dtype).double()
        assert da.dtype == (a_dtype or dtype)
        close(dx, t.double() @ W.double() + dh @ a.double(), 1.0)
        # dh may fall on the other side of a rounding than in float64
        step = torch.finfo(dtype).eps
        exact = 0.75 * t.double() @ b.double()
        truth = exact.t() @ x.double()
        assert (da.double() - truth).norm() <= step * (1 if a_dtype is None else 0.5) * truth.norm() + 1e-12
        alone, nothing = kernels.whole_bwd(t.t().contiguous().t(), W, None, a, b, 0.75, dtype, {})
        assert nothing is None
        assert torch.equal(alone, dx)


def test_the_same_sums_every_time(body):
    dtypes = low_dtypes(body)
    from peft.dora import kernels

    for dtype in dtypes:
        x, W, a, b, t, *_ = drawn((129, 40, 70, 8), dtype, body.device)
        first = kernels.whole_bwd(t, W, x, a, b, 0.75, torch.float32)
        for _ in range(3):
            for one, other in zip(kernels.whole_bwd(t, W, x, a, b, 0.75, torch.float32), first, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"plain": True}], ids=str)
def test_which_launches_a_layer_makes(body, launches, kind, options):
    """One forward and two backward, and one each way for a packed weight to be unpacked."""
    for dtype in low_dtypes(body):
        case = make_case((3, 7), 64, 37, rank=5, dtype=dtype, device=body.device, **options)
        case.cache = NormCache()
        if kind is not None:
            weight = quantised(kind, 37, 64, body.device, dtype=dtype)
            case.W, case.weight = weight.dense(dtype), lambda weight=weight: weight
        launches.clear()
        check(case, body.route)
        ours = [name for name in launches if name not in ("cast_fwd_kernel", "norms_fwd_kernel")]
        unpacked = [] if kind is None else [name for name in ours if name.startswith("dequantise")][:1]
        scaled = [] if "plain" in options else ["compose_bwd_kernel"]
        assert ours == [*unpacked, "whole_fwd_kernel", *scaled, *unpacked, "whole_bwd_kernel"]


def test_where_cublas_multiplies(body):
    low_dtypes(body)
    from peft.dora import kernels
    from peft.dora.kernels import whole

    device, bf16 = torch.device(body.device), torch.bfloat16
    if (
        body.device == "cuda"
        and torch.cuda.get_device_properties(0).shared_memory_per_block_optin < whole.SHARED_BYTES
    ):
        assert kernels.most_whole(device, bf16, (64, 64), 16, 2.0) == 0
        return
    assert kernels.most_whole(device, bf16, (64, 64), 16, 2.0) == whole.MOST_TOKENS
    assert kernels.most_whole(device, bf16, (14336, 4096), 16, 2.0) == 1170
    assert kernels.most_whole(device, bf16, (28672, 8192), 16, 2.0) == 292
    assert kernels.most_whole(device, torch.float32, (64, 64), 16, 2.0) == 0
    assert kernels.most_whole(device, bf16, (64, 64), whole.MOST_RANK + 1, 2.0) == 0
    for scaling in (0.0, 1e-30, 1e30):
        assert kernels.most_whole(device, bf16, (64, 64), 16, scaling) == 0


@pytest.mark.parametrize("options", [{"transposed": True}, {"scaling": 0.0}, {"rank": 40}], ids=str)
def test_what_the_kernels_do_not_take(body, launches, options):
    """A weight by columns, a scaling that cannot be divided by, a large rank."""
    for dtype in low_dtypes(body):
        check(make_case((3, 7), dtype=dtype, device=body.device, **options), body.route)
    assert not any("whole" in name for name in launches)


def test_a_rank_that_changes(body, launches):
    """A and B replaced by larger ones, under the same cache."""
    for dtype in low_dtypes(body):
        cache = NormCache()
        for rank in (4, 40, 8):
            case = make_case((3, 7), rank=rank, dtype=dtype, device=body.device)
            case.cache = cache
            launches.clear()
            check(case, body.route)
            assert any("whole" in name for name in launches) == (rank < 40)
