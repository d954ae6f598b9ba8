# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The one table: layer types × base formats × methods, what each row supports, and where upstream's release differs.

Nothing here imports peft, so that the same rows are built by the tests, by the benchmarks and by the process that
runs upstream's installed release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantisers import QUANTISERS, Quantiser

UPSTREAM = "0.21.2"  # the release whose interface and numbers ours match


# ---- base formats ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Format:
    """How a frozen weight is stored.

    Args:
        name: As it stands in test ids.
        dtype: What goes into the layer and comes out of it; for plain weights also their own dtype.
        quant: A key of `quantisers.QUANTISERS`: `"nf4"`, `"fp4"`, `"int8"`, `"hqq"`, `"gptq"`,
            `"awq"`, `"torchao"`, `"compressed"`, `"aqlm"`; None for plain weights.
        nested: Whether the scales of a 4-bit weight are themselves quantised.
        settings: What else the quantiser is told.
    """

    name: str
    dtype: torch.dtype
    quant: str | None = None
    nested: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def quantiser(self) -> Quantiser | None:
        """The library that stores the weight, asked directly; None for plain weights."""
        return None if self.quant is None else QUANTISERS[self.quant]


FORMATS = {
    form.name: form
    for form in (
        Format("fp32", torch.float32),
        Format("fp16", torch.float16),
        Format("bf16", torch.bfloat16),
        Format("nf4", torch.float32, "nf4"),
        Format("nf4-nested", torch.bfloat16, "nf4", nested=True),
        Format("fp4", torch.bfloat16, "fp4"),
        Format("fp4-nested", torch.float32, "fp4", nested=True),
        Format("int8", torch.float32, "int8"),
        Format("int8-bf16", torch.bfloat16, "int8"),
        Format("hqq4", torch.float32, "hqq", settings={"nbits": 4, "group_size": 16, "axis": 1}),
        Format("hqq4-across", torch.float16, "hqq", settings={"nbits": 4, "group_size": 64, "axis": 0}),
        Format("hqq8", torch.bfloat16, "hqq", settings={"nbits": 8, "group_size": 32, "axis": 1}),
        Format("gptq4", torch.float16, "gptq", settings={"bits": 4, "group_size": 16}),
        Format("gptq4-act-order", torch.float32, "gptq", settings={"bits": 4, "group_size": 16, "desc_act": True}),
        Format("gptq3", torch.float16, "gptq", settings={"bits": 3, "group_size": 32}),
        Format("gptq8", torch.bfloat16, "gptq", settings={"bits": 8, "group_size": 64, "desc_act": True}),
        Format("awq4", torch.float16, "awq", settings={"bits": 4, "group_size": 16}),
        Format("awq8", torch.bfloat16, "awq", settings={"bits": 8, "group_size": 32}),
        Format("hqq3", torch.float32, "hqq", settings={"nbits": 3, "group_size": 8, "axis": 0}),
        Format("ao-int8", torch.float32, "torchao", settings={"config": "Int8WeightOnlyConfig"}),
        Format("ao-int8-bf16", torch.bfloat16, "torchao", settings={"config": "Int8WeightOnlyConfig"}),
        Format("ao-float8", torch.bfloat16, "torchao", settings={"config": "Float8WeightOnlyConfig"}),
        Format(
            "ao-int4",
            torch.float32,
            "torchao",
            settings={"config": "IntxWeightOnlyConfig", "weight_dtype": torch.int4, "group_size": 32},
        ),
        Format("ct-int8", torch.float32, "compressed", settings={"num_bits": 8, "strategy": "channel"}),
        Format(
            "ct-int4",
            torch.bfloat16,
            "compressed",
            settings={"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        ),
        Format(
            "aqlm",
            torch.float32,
            "aqlm",
            settings={"in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 6},
        ),
    )
}
FLOATS = ("fp32", "fp16", "bf16")
FOUR_BIT = ("nf4", "nf4-nested", "fp4", "fp4-nested")
EIGHT_BIT = ("int8", "int8-bf16")
HQQ = ("hqq4", "hqq4-across", "hqq8", "hqq3")
GPTQ = ("gptq4", "gptq4-act-order", "gptq3", "gptq8")
AWQ = ("awq4", "awq8")
TORCHAO = ("ao-int8", "ao-int8-bf16", "ao-float8", "ao-int4")
COMPRESSED = ("ct-int8", "ct-int4")


# ---- layers ----------------------------------------------------------------------------------------------------------
class Wrapped(nn.Module):
    """A model whose whole forward pass is the layer under test, `body`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@dataclass(frozen=True)
class Layer:
    """A layer type, in one configuration.

    Args:
        name: As it stands in test ids.
        build: Makes the layer, float32 on the CPU; takes the format's quantisation arguments where it has any.
        shape: Shape of an input.
        formats: Names of the base formats that it comes in.
        rank: A rank that it can take.
        ids: How many different ids an input may hold; 0 where inputs are floating-point.
        kind: `"linear"`, `"embedding"` or `"conv"`.
        groups: Of a convolution.
        dilated: Whether a convolution's kernel has gaps.
        padding_mode: Of a convolution.
    """

    name: str
    build: Callable[..., nn.Module]
    shape: tuple[int, ...]
    formats: tuple[str, ...] = FLOATS
    rank: int = 3
    ids: int = 0
    kind: str = "linear"
    groups: int = 1
    dilated: bool = False
    padding_mode: str = "zeros"

    def model(self, form: Format, device: str = "cpu", seed: int = 0) -> Wrapped:
        """The layer in a model, with weights that depend on `seed` alone."""
        torch.manual_seed(seed)
        if form.quant is None:
            return Wrapped(self.build()).to(device=device, dtype=form.dtype)
        # Marked as transformers marks the models that it loads quantised.
        model = Wrapped(self.build(form)).to(form.dtype)
        if form.quantiser.mark is not None:
            setattr(model, form.quantiser.mark, True)
        return form.quantiser.move(model, device)

    def input(self, form: Format, device: str = "cpu", seed: int = 1) -> torch.Tensor:
        """An input that depends on `seed` alone; a leaf that asks for its gradient where it is floating-point."""
        generator = torch.Generator().manual_seed(seed)
        if self.ids:
            return torch.randint(self.ids, self.shape, generator=generator).to(device)
        x = torch.randn(self.shape, generator=generator).to(form.dtype).to(device)
        return x.requires_grad_()


def _transformers_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(13, 10)
    nn.init.normal_(layer.bias, std=0.1)
    return layer


def _quantised(form: Format) -> nn.Module:
    # On some CPUs bitsandbytes packs a weight anew for inference, which takes a multiple of 32 output features.
    return form.quantiser.build(nn.Linear(64, 96).requires_grad_(False), form)


def _conv(name: str, dims: int, size: int, in_channels: int = 4, out_channels: int = 6, **kwargs: Any) -> Layer:
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    groups = kwargs.get("groups", 1)
    return Layer(
        name,
        lambda: cls(in_channels, out_channels, **kwargs),
        (2, in_channels, *[size] * dims),
        rank=2 * groups if groups > 1 else 3,
        kind="conv",
        groups=groups,
        dilated="dilation" in kwargs,
        padding_mode=kwargs.get("padding_mode", "zeros"),
    )


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("linear", lambda: nn.Linear(10, 13), (2, 5, 10)),
        Layer("linear_nobias", lambda: nn.Linear(10, 13, bias=False), (5, 10)),
        Layer("transformers_conv1d", _transformers_conv1d, (2, 5, 10)),
        Layer("embedding", lambda: nn.Embedding(11, 7), (2, 5), ids=11, kind="embedding"),
        Layer("embedding_padding", lambda: nn.Embedding(11, 7, padding_idx=2), (3, 9), ids=11, kind="embedding"),
        _conv("conv1d", 1, 9, kernel_size=3),
        _conv("conv1d_all", 1, 11, kernel_size=3, stride=2, padding=2, dilation=2, padding_mode="replicate"),
        _conv("conv2d", 2, 6, kernel_size=(3, 2)),
        _conv("conv2d_nobias", 2, 6, kernel_size=1, bias=False),
        _conv("conv2d_stride", 2, 7, kernel_size=3, stride=(2, 1), padding=1),
        _conv("conv2d_same", 2, 6, kernel_size=3, padding="same"),
        _conv("conv2d_dilation", 2, 8, kernel_size=3, dilation=(2, 1)),
        _conv("conv2d_reflect", 2, 6, kernel_size=3, padding=1, padding_mode="reflect"),
        _conv("conv2d_circular", 2, 6, kernel_size=3, padding=(1, 2), padding_mode="circular"),
        _conv("conv2d_groups", 2, 6, kernel_size=3, groups=2),
        _conv("conv2d_depthwise", 2, 6, out_channels=8, kernel_size=3, groups=4, padding=1),
        _conv("conv3d", 3, 5, kernel_size=(3, 2, 1)),
        _conv("conv3d_all", 3, 6, kernel_size=2, stride=2, padding=1, dilation=2),
        Layer("linear4bit", _quantised, (2, 3, 64), FOUR_BIT),
        Layer("linear8bit", _quantised, (2, 3, 64), EIGHT_BIT),
        Layer("hqq_linear", _quantised, (2, 3, 64), HQQ),
        Layer("gptq_linear", _quantised, (2, 3, 64), GPTQ),
        Layer("awq_linear", _quantised, (2, 3, 64), AWQ),
        Layer("torchao_linear", _quantised, (2, 3, 64), TORCHAO),
        Layer("compressed_linear", _quantised, (2, 3, 64), COMPRESSED),
        Layer("aqlm_linear", _quantised, (2, 3, 64), ("aqlm",)),
    )
}


# ---- methods ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Method:
    """An adapter's method: its name in test ids and what it adds to a `LoraConfig`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dora(self) -> bool:
        return self.options.get("use_dora", False)

    @property
    def triton(self) -> bool:
        return self.options.get("use_dora_triton", False)


METHODS = {
    method.name: method
    for method in (
        Method("lora"),
        Method("dora", {"use_dora": True}),
        Method("dora-triton", {"use_dora": True, "use_dora_triton": True}),
    )
}


# ---- rows ------------------------------------------------------------------------------------------------------------
STATES = (
    "train",  # outputs, and gradients to the input, A, B and the magnitude
    "eval",
    "dropout",
    "lora_bias",
    "low_precision",  # adapters in the base's own dtype: autocast_adapter_dtype=False
    "merged",
    "safe_merged",
    "unmerged",
    "disabled",
    "two_adapters",
    "saved",
    "deepcopied",
    "low_cpu_mem",
)


@dataclass(frozen=True)
class Row:
    """One layer type in one base format with one method."""

    layer: Layer
    form: Format
    method: Method

    @property
    def id(self) -> str:
        return f"{self.layer.name}-{self.form.name}-{self.method.name}"

    @property
    def states(self) -> tuple[str, ...]:
        """The states that this row has."""
        without = set()
        if self.layer.kind == "embedding":
            without.add("lora_bias")  # an embedding has no bias to merge into: refused, in every release
        if self.form.dtype == torch.float32 or self.form.quant in ("int8", "gptq", "awq"):
            without.add("low_precision")  # the base's dtype is float32, or no floating-point one
        if self.form.quant is not None and self.form.quantiser.requantised is None:
            without |= {*MERGES, "lora_bias", "disabled"}  # whose tests merge
        return tuple(state for state in STATES if state not in without)

    def options(self, **more: Any) -> dict[str, Any]:
        """Arguments of a `LoraConfig` for the model of this row."""
        return {"target_modules": ["body"], "r": self.layer.rank, "lora_alpha": 5, **self.method.options, **more}

    @property
    def in_peer(self) -> bool:
        """Whether the environment of upstream's release has what this row's format needs."""
        return self.form.quant is None or self.form.quantiser.package == "bitsandbytes"

    def upstream(self, state: str) -> str | None:
        """Why upstream's release cannot be compared with in a state; None where it can."""
        if self.method.triton:
            return "upstream has no use_dora_triton; the row without it is compared"
        if not self.in_peer:
            return f"the peer's environment has no {self.form.quantiser.package}"
        return next((fault.reason for fault in UPSTREAM_FAULTS if fault.touches(self, state)), None)


@dataclass(frozen=True)
class Fault:
    """Rows and states in which upstream's release is wrong, with the test in tests/interop/test_faults.py.

    Args:
        reason: What goes wrong there.
        rows: Which rows it touches.
        states: Which of their states; empty for all.
    """

    reason: str
    rows: Callable[[Row], bool]
    states: tuple[str, ...] = ()

    def touches(self, row: Row, state: str) -> bool:
        return (not self.states or state in self.states) and self.rows(row)


MERGES = ("merged", "safe_merged", "unmerged")
UNMERGED = tuple(state for state in STATES if state not in ("merged", "safe_merged", "disabled"))
UPSTREAM_FAULTS: tuple[Fault, ...] = (
    Fault("DoRA with lora_bias is refused", lambda row: row.method.dora, ("lora_bias",)),
    Fault("convolutions with groups refuse to merge", lambda row: row.layer.groups > 1, MERGES),
    Fault(
        "DoRA on a convolution with groups takes the norm of another matrix than the weight that it applies",
        lambda row: row.layer.groups > 1 and row.method.dora,
        tuple(state for state in STATES if state != "disabled"),
    ),
    Fault(
        "A of a convolution with dilation has none, so that the branch's output has another size",
        lambda row: row.layer.dilated,
        UNMERGED,
    ),
    Fault(
        "A of a convolution pads with zeros whatever the padding mode, so that merging changes the output",
        lambda row: row.layer.padding_mode != "zeros",
        UNMERGED,
    ),
    Fault(
        "DoRA with dropout on a convolution in half precision multiplies a float32 input by a half-precision weight",
        lambda row: row.layer.kind == "conv" and row.method.dora and row.form.dtype != torch.float32,
        ("dropout",),
    ),
    Fault(
        "DoRA on an int8 layer on the CPU survives one forward pass, and does not load from meta",
        lambda row: row.form.quant == "int8" and row.method.dora,
        ("eval", "two_adapters", "low_cpu_mem"),
    ),
    Fault(
        "loading from meta rounds float32 adapters to the base's half precision",
        lambda row: row.form.dtype != torch.float32 and row.form.quant != "int8",
        ("low_cpu_mem",),
    ),
    Fault(
        "unmerging a quantised layer does not give its bytes back",
        lambda row: row.form.quant is not None,
        ("unmerged",),
    ),
)


def rows(**only: str) -> list[Row]:
    """The rows of the table, or those of one `layer`, `form` or `method`."""
    return [
        row
        for layer in LAYERS.values()
        for form in layer.formats
        for method in METHODS.values()
        for row in (Row(layer, FORMATS[form], method),)
        if all(getattr(row, key).name == value for key, value in only.items())
    ]
