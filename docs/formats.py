# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Writes the table of storage formats into the page about quantised models: what the code says of each, and how it was
verified.

python formats.py            # print it
python formats.py --write    # put it between the marks in docs/source/developer_guides/quantization.md
python formats.py --check    # fail if the page says something else than the code
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from marked import run

from peft.weights import BaseWeight
from peft.weights.aqlm import AqlmWeight
from peft.weights.awq import AwqWeight
from peft.weights.bnb import Weight4bit, Weight8bit
from peft.weights.closed import ClosedWeight
from peft.weights.compressed import CompressedTensorsWeight
from peft.weights.eetq import EetqWeight
from peft.weights.fp8 import Float8Weight
from peft.weights.gptq import GptqWeight
from peft.weights.hqq import HqqWeight
from peft.weights.inc import IncWeight
from peft.weights.te import TeWeight
from peft.weights.torchao import TorchaoWeight

BEGIN, END = "<!-- formats: begin (docs/formats.py) -->", "<!-- formats: end -->"
PAGE = Path(__file__).parent / "source" / "developer_guides" / "quantization.md"
_TRANSFORMERS = "transformers.integrations"
_GPTQMODEL = "gptqmodel.nn_modules.qlinear"


@dataclass(frozen=True)
class Form:
    """One row.

    Args:
        name: What a reader calls the format.
        weight: What reads it.
        tests: Its test file, below tests/.
        verified: Where the library itself ran in these tests; empty where its layers were built to its layout.
        layers: Qualified names of the layer classes, where they tell the format.
        tensor: The class of the weight, where that tells it.
        cases: Formats of tests/cases.py that are this one.
        by_rows: Those of them whose bytes no kernel reads, although it reads others'.
        remark: What else has to be said.
    """

    name: str
    weight: type[BaseWeight]
    tests: str
    verified: str
    layers: tuple[str, ...] = ()
    tensor: str | None = None
    cases: tuple[str, ...] = ()
    by_rows: tuple[str, ...] = ()
    remark: str = ""

    @property
    def norm(self) -> str:
        """What DoRA's norm reads with Triton."""
        return "rows" if self.weight.packed is BaseWeight.packed else "packed bytes"

    @property
    def merges(self) -> bool:
        """Whether a matrix can be stored."""
        layer = SimpleNamespace(weight=type(self.tensor or "Tensor", (), {})())
        return self.weight.why_read_only(SimpleNamespace(layer=layer)) is None


FORMS = (
    Form(
        "bitsandbytes 4 bit (NF4, FP4)", Weight4bit, "weights/test_bnb_weights.py", "CPU, GPU",
        ("bitsandbytes.nn.modules.Linear4bit",), cases=("nf4", "nf4-nested", "fp4", "fp4-nested"),
    ),
    Form(
        "bitsandbytes 8 bit", Weight8bit, "weights/test_bnb_weights.py", "CPU, GPU",
        ("bitsandbytes.nn.modules.Linear8bitLt",), cases=("int8", "int8-bf16"),
    ),
    Form(
        "HQQ", HqqWeight, "weights/test_hqq_weights.py", "CPU", ("hqq.core.quantize.HQQLinear",),
        cases=("hqq4", "hqq4-across", "hqq8", "hqq3"), by_rows=("hqq4-across",),
        remark="the norm by rows where groups end within one",
    ),
    Form(
        "GPTQ", GptqWeight, "weights/test_gptq_awq_weights.py", "CPU", (f"{_GPTQMODEL}.torch.TorchLinear",),
        cases=("gptq4", "gptq4-act-order", "gptq3", "gptq8"), remark="gptqmodel's backends with the common layout",
    ),
    Form(
        "AWQ", AwqWeight, "weights/test_gptq_awq_weights.py", "CPU",
        (
            f"{_GPTQMODEL}.torch_awq.AwqTorchLinear", f"{_GPTQMODEL}.gemm_awq.AwqGEMMLinear",
            f"{_GPTQMODEL}.gemm_awq_triton.AwqGEMMTritonLinear", "awq.modules.linear.gemm.WQLinear_GEMM",
        ),
        cases=("awq4", "awq8"), remark="gptqmodel's, and autoawq's for GEMM",
    ),
    Form(
        "gptqmodel's other backends", ClosedWeight, "weights/test_closed_weights.py", "",
        (f"{_GPTQMODEL}.paroquant.ParoLinear", f"{_GPTQMODEL}.BaseQuantLinear"),
        remark="Marlin, Machete, ExLlama and others, in a layout of their own: read through their product",
    ),
    Form(
        "AQLM", AqlmWeight, "weights/test_aqlm_weights.py", "CPU", ("aqlm.inference.QuantizedLinear",), cases=("aqlm",),
        remark="codes come from a search",
    ),
    Form(
        "torchao int8", TorchaoWeight, "weights/test_torchao_weights.py", "CPU", tensor="Int8Tensor",
        cases=("ao-int8", "ao-int8-bf16"), remark="weight-only, by row, group or tensor, and with dynamic activations",
    ),
    Form(
        "torchao float8", TorchaoWeight, "weights/test_torchao_weights.py", "CPU", tensor="Float8Tensor",
        cases=("ao-float8",), remark="weight-only on a CPU; with dynamic activations on a GPU alone",
    ),
    Form(
        "torchao intx (1 to 8 bits)", TorchaoWeight, "weights/test_torchao_weights.py", "CPU",
        tensor="IntxUnpackedToInt8Tensor", cases=("ao-int4",), remark="weight-only and with dynamic int8 activations",
    ),
    Form(
        "torchao int4 for CPUs", TorchaoWeight, "weights/test_torchao_weights.py", "CPU", tensor="Int4OpaqueTensor",
        remark="read through its product",
    ),
    Form(
        "torchao int4 for GPUs, tiled", TorchaoWeight, "weights/test_torchao_weights.py", "",
        tensor="Int4TilePackedTo4dTensor", remark="read through its product",
    ),
    Form(
        "torchao int4 for GPUs, plain", TorchaoWeight, "weights/test_torchao_weights.py", "", tensor="Int4Tensor",
        remark="read through its product",
    ),
    Form(
        "compressed-tensors", CompressedTensorsWeight, "weights/test_compressed_weights.py", "CPU",
        cases=("ct-int8", "ct-int4"),
        remark="integers, float8, NVFP4, MXFP4/6/8; packed, or rounded in each forward pass; once unpacked it is a plain weight",
    ),
    Form(
        "compressed-tensors float8 in transformers", Float8Weight, "weights/test_fp8_weights.py", "CPU",
        (f"{_TRANSFORMERS}.compressed_tensors.CompressedTensorsFP8Linear",),
    ),
    Form(
        "transformers' float8 (`FP8Linear`)", Float8Weight, "weights/test_fp8_weights.py", "CPU, but for the kernel",
        (f"{_TRANSFORMERS}.finegrained_fp8.FP8Linear",), remark="scales by block or tensor, float32 or UE8M0",
    ),
    Form(
        "FBGEMM float8 in transformers", Float8Weight, "weights/test_fp8_weights.py", "",
        (f"{_TRANSFORMERS}.fbgemm_fp8.FbgemmFp8Linear",),
    ),
    Form(
        "Intel Neural Compressor float8", IncWeight, "weights/test_inc_weights.py", "CPU",
        ("neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules.PatchedLinear",),
        remark="the mode with `use_qdq`; Gaudi's keeps the same tensors",
    ),
    Form(
        "EETQ", EetqWeight, "weights/test_layouts_of_absent_libraries.py", "",
        (f"{_TRANSFORMERS}.eetq.EetqLinear", "eetq.modules.qlinear.EETQLinear"), remark="read through its product",
    ),
    Form(
        "Transformer Engine", TeWeight, "weights/test_layouts_of_absent_libraries.py", "",
        ("transformer_engine.pytorch.module.linear.Linear",),
        remark="a float8 weight is made dense as a whole; a plain one is read by rows",
    ),
)  # fmt: skip


def table() -> str:
    lines = [
        "| Format | LoRA class | DoRA's norm reads | Merging | Verified on | Remarks |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for form in FORMS:
        merging = "rounded anew" if form.merges else "refused"
        lines.append(
            f"| {form.name} | `{lora_class(form)}` | {form.norm} | {merging} | {form.verified or '—'} | {form.remark} |"
        )
    return "\n".join(lines)


def lora_class(form: Form) -> str:
    """The layer that LoRA puts around one of these."""
    from peft.tuners.lora import aqlm, awq, bnb, eetq, gptq, hqq, inc, layer, te, torchao

    return {
        Weight4bit: bnb.Linear4bit, Weight8bit: bnb.Linear8bitLt, HqqWeight: hqq.HqqLoraLinear,
        GptqWeight: gptq.GPTQLoraLinear, AwqWeight: awq.AwqLoraLinear, ClosedWeight: gptq.GPTQLoraLinear,
        AqlmWeight: aqlm.AqlmLoraLinear, TorchaoWeight: torchao.TorchaoLoraLinear, IncWeight: inc.IncLoraLinear,
        EetqWeight: eetq.EetqLoraLinear, TeWeight: te.TeLinear,
    }.get(form.weight, layer.Linear).__name__  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(__doc__, [PAGE], BEGIN, END, table()))
