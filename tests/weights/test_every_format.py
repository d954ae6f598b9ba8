# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The one table: every storage format × LoRA, DoRA and DoRA with Triton × forward, backward, merging, unmerging, saving and
loading; and that the documentation's table says what is so. What a format does not do it refuses for the reason that its
row states, before anything is changed. A new format is one row here beside its file in peft/weights."""

from __future__ import annotations

import importlib.util
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import makers
import pytest
import te_layout
import torch
from storage import (
    Model,
    adapted,
    check_broken_adapter_is_not_merged,
    check_merging,
    check_saving,
    check_training,
    lora_layers,
    same_bytes,
    stored,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import integrations

from cases import FORMATS as CASES
from cases import METHODS, Wrapped
from cases import Format as CaseFormat
from peft import dora
from peft.dora import norm as dora_norm
from peft.weights import FORMATS, find_weight, through

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
documented = importlib.import_module("formats")

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
OUT, FEATURES = 128, 64  # bitsandbytes on a CPU wants multiples of its blocks


@dataclass(frozen=True)
class Row:
    """One way in which a weight is stored.

    Args:
        name: As it stands in test ids.
        form: The name that its format is registered by.
        make: A layer from (out, features, seed) and the device.
        dtype: Of inputs.
        rounding: Relative error that storing a merged weight may make in an output.
        package: The library that the layer is of; None where the layer, or the kernel of its product, is a stand-in.
        devices: Where it runs.
        mark: The attribute by which transformers marks a model that it loaded so.
        refuses: Why nothing can be merged, as the error says it; None where it can.
        exact: False where the weight is a plain one, which unmerging computes back.
    """

    name: str
    form: str
    make: Callable[[int, int, int, str], nn.Module]
    dtype: torch.dtype
    rounding: float
    package: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    mark: str | None = None
    refuses: str | None = None
    exact: bool = True

    def model(self, device: str) -> Model:
        model = Model(self.make(OUT, FEATURES, 0, device), self.make(FEATURES, OUT, 1, device))
        if self.mark is not None:
            setattr(model, self.mark, True)
        return model

    def input(self, device: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randn(2, 3, FEATURES, generator=generator).to(self.dtype).to(device)


def of_case(case: str | CaseFormat, form: str, rounding: float) -> Row:
    """A format as tests/cases.py tells them, or one of those, made by its library."""
    stored_as = CASES[case] if isinstance(case, str) else case
    quantiser = stored_as.quantiser

    def make(out: int, features: int, seed: int, device: str) -> nn.Module:
        torch.manual_seed(seed)
        layer = quantiser.build(nn.Linear(features, out).requires_grad_(False), stored_as)
        layer = quantiser.move(Wrapped(layer), device).body
        with torch.no_grad():  # some libraries settle what they store when a layer first runs
            layer(torch.zeros(1, features, dtype=stored_as.dtype, device=device))
        return layer

    refuses = None if quantiser.requantised is not None else "AQLM's codes come from a search"
    return Row(
        stored_as.name, form, make, stored_as.dtype, rounding, quantiser.package, ("cpu", "cuda"), quantiser.mark, refuses,
    )  # fmt: skip


def by_hand(build: Callable) -> Callable[[int, int, int, str], nn.Module]:
    """A layer of transformers that is filled with a matrix."""

    def make(out: int, features: int, seed: int, device: str) -> nn.Module:
        torch.manual_seed(seed)
        matrix, bias = torch.randn(out, features) / features**0.5, torch.randn(out)
        return build(out, features, matrix, bias).requires_grad_(False)

    return make


def bitnet(out: int, features: int, seed: int, device: str) -> nn.Module:
    torch.manual_seed(seed)
    layer = integrations.bitnet.BitLinear(features, out, bias=True, dtype=BF16)
    layer.weight.copy_(integrations.bitnet.pack_weights(torch.randint(-1, 2, (out, features))))
    layer.weight_scale.fill_(features**0.5), layer.bias.normal_()
    return layer.requires_grad_(False)


def bitnet_floats(online: bool) -> Callable[..., nn.Module]:
    def build(out: int, features: int, matrix: torch.Tensor, bias: torch.Tensor) -> nn.Module:
        layer = integrations.bitnet.AutoBitLinear(features, out, bias=online, online_quant=online)
        layer.weight.data = matrix
        if online:
            layer.bias.data = bias
        else:
            layer.weight_scale.fill_(1.5)
        return layer

    return build


def by_torchao(config: Callable) -> Callable[[int, int, int, str], nn.Module]:
    def make(out: int, features: int, seed: int, device: str) -> nn.Module:
        from torchao import quantization

        torch.manual_seed(seed)
        layer = nn.Linear(features, out).to(device, torch.bfloat16).requires_grad_(False)
        quantization.quantize_(layer, config())
        return layer

    return make


def _int8_dynamic():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _float8_dynamic():
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


def _int4_on_cpu():
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)


def _int4_on_gpu(**settings):
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=32, **settings)


def inc(out: int, features: int, seed: int, device: str) -> nn.Module:
    from neural_compressor.torch.quantization import FP8Config, convert, prepare

    torch.manual_seed(seed)
    settings = FP8Config(fp8_config="E4M3", use_qdq="True", scale_method="MAXABS_ARBITRARY")
    model = prepare(Wrapped(nn.Linear(features, out)).bfloat16(), settings)
    model(torch.randn(6, features).bfloat16())
    return convert(model).requires_grad_(False).body


def by_compressed_tensors(preset: str) -> Callable[[int, int, int, str], nn.Module]:
    def make(out: int, features: int, seed: int, device: str) -> nn.Module:
        from compressed_layers import by_preset, quantised

        torch.manual_seed(seed)
        model = Wrapped(nn.Linear(features, out)).to(device, torch.bfloat16)
        return quantised(model, by_preset(preset), "rounded").body

    return make


def marlin(out: int, features: int, seed: int, device: str) -> nn.Module:
    return makers.named("MarlinLinear")(out, features)


BITNET_FLOATS = "BitNet in transformers, as floats (`AutoBitLinear`)"
BNB_4BIT, FP8 = "bitsandbytes 4 bit (NF4, FP4)", "transformers' float8 (`FP8Linear`)"
ROWS = [
    of_case("nf4", BNB_4BIT, 0.2),
    of_case("nf4-nested", BNB_4BIT, 0.2),
    of_case("fp4", BNB_4BIT, 0.3),
    of_case("fp4-nested", BNB_4BIT, 0.3),
    of_case("int8", "bitsandbytes 8 bit", 0.05),
    of_case("int8-bf16", "bitsandbytes 8 bit", 0.05),
    of_case("hqq4", "HQQ", 0.2),
    of_case("hqq4-across", "HQQ", 0.25),
    of_case("hqq8", "HQQ", 0.05),
    of_case("hqq3", "HQQ", 0.4),
    of_case(CaseFormat("hqq8-across", FP32, "hqq", settings={"nbits": 8, "group_size": 64, "axis": 0}), "HQQ", 0.05),
    of_case(CaseFormat("hqq2", BF16, "hqq", settings={"nbits": 2, "group_size": 16, "axis": 1}), "HQQ", 0.7),
    of_case(CaseFormat("hqq1", FP32, "hqq", settings={"nbits": 1, "group_size": 16, "axis": 1}), "HQQ", 1.0),
    of_case("gptq4", "GPTQ", 0.2),
    of_case("gptq4-act-order", "GPTQ", 0.2),
    of_case("gptq3", "GPTQ", 0.4),
    of_case("gptq8", "GPTQ", 0.05),
    of_case(CaseFormat("gptq2", HALF, "gptq", settings={"bits": 2, "group_size": 16}), "GPTQ", 0.7),
    *(
        of_case(
            CaseFormat(f"gptq{bits}-act-order", HALF, "gptq", settings={"bits": bits, "group_size": 32, "desc_act": True}),
            "GPTQ", room,
        )
        for bits, room in ((2, 0.7), (3, 0.4))
    ),
    of_case("awq4", "AWQ", 0.2),
    of_case("awq8", "AWQ", 0.05),
    Row("gptqmodel-marlin", "gptqmodel's other backends", marlin, FP32, 0.0, refuses='backend="gptq_torch"'),
    of_case("aqlm", "AQLM", 0.0),
    of_case("ao-int8", "torchao int8", 0.05),
    of_case("ao-int8-bf16", "torchao int8", 0.05),
    Row("ao-int8-dynamic", "torchao int8", by_torchao(_int8_dynamic), BF16, 0.1, "torchao", ("cpu", "cuda")),
    of_case("ao-float8", "torchao float8", 0.1),
    Row("ao-float8-dynamic", "torchao float8", by_torchao(_float8_dynamic), BF16, 0.2, "torchao", ("cuda",)),
    of_case("ao-int4", "torchao intx (1 to 8 bits)", 0.3),
    Row("ao-int4-cpu", "torchao int4 for CPUs", by_torchao(_int4_on_cpu), BF16, 0.3, "torchao"),
    Row(
        "ao-int4-tiled", "torchao int4 for GPUs, tiled",
        by_torchao(lambda: _int4_on_gpu(int4_packing_format="tile_packed_to_4d")), BF16, 0.3, "torchao", ("cuda",),
    ),
    Row("ao-int4-plain", "torchao int4 for GPUs, plain", by_torchao(_int4_on_gpu), BF16, 0.3, "mslk", ("cuda",)),
    of_case("ct-int8", "compressed-tensors", 0.05),
    of_case("ct-int4", "compressed-tensors", 0.3),
    *(
        Row(
            f"ct-{preset.lower()}", "compressed-tensors", by_compressed_tensors(preset), BF16, room, "compressed_tensors",
            ("cpu", "cuda"),
        )
        for preset, room in (("W8A8", 0.05), ("FP8", 0.1), ("NVFP4A16", 0.3), ("MXFP4A16", 0.4))
    ),
    Row(
        "ct-fp8-row", "compressed-tensors float8 in transformers", by_hand(makers.rowwise), FP32, 0.1, "transformers",
    ),
    Row("fp8-block", FP8, by_hand(makers.blocked()), FP32, 0.1, "transformers"),
    Row("fp8-block-ue8m0", FP8, by_hand(makers.blocked(scale_fmt="ue8m0")), FP32, 0.1, "transformers"),
    Row("fp8-tensor", FP8, by_hand(makers.blocked(None)), FP32, 0.1, "transformers"),
    Row("fbgemm-layout", "FBGEMM float8 in transformers", by_hand(makers.fbgemm), FP32, 0.1),
    Row("bitnet", "BitNet in transformers, packed (`BitLinear`)", bitnet, BF16, 0.5, "transformers"),
    Row("bitnet-rounded", BITNET_FLOATS, by_hand(bitnet_floats(True)), FP32, 0.5, "transformers"),
    Row("bitnet-scaled", BITNET_FLOATS, by_hand(bitnet_floats(False)), FP32, 0.05, "transformers"),
    Row("inc", "Intel Neural Compressor float8", inc, BF16, 0.2, "neural_compressor"),
    Row(
        "eetq-layout", "EETQ", lambda out, features, seed, device: makers.eetq_linear("transformers", out, features, seed),
        HALF, 0.05,
    ),
    *(
        Row(
            f"te-{name.replace(' ', '-')}-layout", "Transformer Engine",
            lambda out, features, seed, device, name=name: te_layout.te_linear(name, out, features, seed), BF16, 0.1,
            exact=name != "plain",
        )
        for name in ("plain", *te_layout.KINDS)
    ),
]  # fmt: skip
CELLS = [
    pytest.param(row, device, id=f"{row.name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for row in ROWS
    for device in row.devices
]
cells = pytest.mark.parametrize(("row", "device"), CELLS)
methods = pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)


@pytest.fixture(autouse=True)
def libraries(request, monkeypatch, tmp_path):
    """A row's library is there; PyTorch stands in for the kernels that need a GPU."""
    row = request.node.callspec.params.get("row") if hasattr(request.node, "callspec") else None
    if row is not None and row.package is not None and importlib.util.find_spec(row.package) is None:
        pytest.skip(f"{row.package} is not installed")
    monkeypatch.setattr(makers.by_block, "fp8_linear", makers.pytorch_body)
    monkeypatch.setattr(makers.fbgemm_fp8.FbgemmFp8Linear, "forward", makers.fbgemm_body)
    monkeypatch.setattr(makers.transformers_eetq, "eetq_kernels_hub", makers.Kernels, raising=False)
    monkeypatch.chdir(tmp_path)  # Neural Compressor writes what it measured there
    with torch.compiler.set_stance("force_eager"):  # some libraries compile their products
        yield


def test_every_format_has_its_rows():
    assert {row.form for row in ROWS} == {form.name for form in FORMATS}
    assert {row.name for row in ROWS} >= {name for name, case in CASES.items() if case.quant is not None}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_format_is_verified_where_a_row_runs_its_library(form):
    rows = [row for row in ROWS if row.form == form.name and row.package is not None]
    devices = {device for row in rows for device in row.devices}
    assert ("CPU" in form.verified) == ("cpu" in devices)
    assert "GPU" not in form.verified or "cuda" in devices


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@cells
def test_what_the_documentation_says_of_a_format_is_so(row, device, use_dora):
    form = next(form for form in FORMATS if form.name == row.form)
    for layer in lora_layers(adapted(row.model(device), use_dora=use_dora)):
        base = layer.get_base_layer()
        weight = find_weight(base)
        assert type(layer) is documented.lora_class(form) and type(weight) is form.weight
        assert form.tensor is None or type(base.weight).__name__ == form.tensor
        assert (weight.packed() is not None) == documented.reads_packed_bytes(form)
        assert (weight.why_read_only() is None) == documented.merges(form) == (row.refuses is None)


@methods
@cells
def test_forward_and_backward(row, device, method):
    check_training(lambda: row.model(device), row.input(device), 0.1 if row.exact else 0.03, **method.options)


@methods
@cells
def test_merging_and_unmerging(row, device, method):
    def make():
        return row.model(device)

    if row.refuses is None:
        check_merging(make, row.input(device), row.rounding, exact=row.exact, **method.options)
        check_broken_adapter_is_not_merged(make, **method.options)
        return
    tuned = adapted(make(), **method.options)
    before = [stored(layer.get_base_layer()) for layer in lora_layers(tuned)]
    for merge in (tuned.merge_adapter, tuned.merge_and_unload, lambda: tuned.merge_adapter(safe_merge=True)):
        with pytest.raises((TypeError, RuntimeError), match=row.refuses):
            merge()
    for layer, bytes_before in zip(lora_layers(tuned), before, strict=True):
        assert not layer.merged and same_bytes(stored(layer.get_base_layer()), bytes_before)


@methods
@cells
def test_saving_and_loading(row, device, method, tmp_path):
    check_saving(lambda: row.model(device), row.input(device), str(tmp_path / "adapter"), **method.options)


class Dense(TorchDispatchMode):
    """The most bytes that floating tensors take together at any time, those of the layer left out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.peak = 0
        held = [tensor for tensor in (*layer.parameters(), *layer.buffers()) if type(tensor.data) is torch.Tensor]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in held}
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if type(tensor) is torch.Tensor and tensor.is_floating_point() and tensor.element_size() > 1:
                self.made.append(weakref.ref(tensor))
        living = [tensor.untyped_storage() for tensor in (ref() for ref in self.made) if tensor is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in living}
        self.peak = max(self.peak, sum(size for place, size in sizes.items() if place not in self.known))
        self.made = [ref for ref in self.made if ref() is not None]
        return made


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if "cpu" in row.devices])
def test_the_norm_makes_no_more_than_a_chunk_dense(row, monkeypatch):
    """64 MiB of a large weight, all temporaries together; here so much less that a small one is read in several chunks."""
    assert dora_norm.CHUNK_BYTES == 2 * through.CHUNK_BYTES == 64 * 2**20
    out, features = 512, 256
    chunk = out * features * 4 // 2
    monkeypatch.setattr(dora_norm, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(through, "CHUNK_BYTES", chunk // 2)
    weight = find_weight(row.make(out, features, 0, "cpu"))
    A, B = torch.randn(2, features), torch.randn(out, 2)
    with Dense(weight.layer) as dense:
        found = dora.row_norm(weight, A, B, 0.5)
    torch.testing.assert_close(
        found.double(), (weight.dense(torch.float64) + 0.5 * B.double() @ A.double()).norm(dim=1), rtol=1e-5, atol=0
    )
    vectors = 4 * 4 * (out + features)  # scales and norms
    assert 0 < dense.peak <= chunk + vectors
