# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Writes the table of storage formats into the page about quantised models: what the code says of each, and how it was
verified.

python formats.py            # print it
python formats.py --write    # put it between the marks in docs/source/developer_guides/quantization.md
python formats.py --check    # fail if the page says something else than the code
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

from marked import run

from peft.tuners import lora
from peft.weights import FORMATS, BaseWeight, Format

BEGIN, END = "<!-- formats: begin (docs/formats.py) -->", "<!-- formats: end -->"
PAGE = Path(__file__).parent / "source" / "developer_guides" / "quantization.md"
# Upstream's classes for formats, by what reads them; LoRA on any other format is a `Linear`.
_LORA_CLASSES = {
    "Weight4bit": lora.bnb.Linear4bit,
    "Weight8bit": lora.bnb.Linear8bitLt,
    "HqqWeight": lora.hqq.HqqLoraLinear,
    "GptqWeight": lora.gptq.GPTQLoraLinear,
    "ClosedWeight": lora.gptq.GPTQLoraLinear,
    "AwqWeight": lora.awq.AwqLoraLinear,
    "AqlmWeight": lora.aqlm.AqlmLoraLinear,
    "TorchaoWeight": lora.torchao.TorchaoLoraLinear,
    "IncWeight": lora.inc.IncLoraLinear,
    "EetqWeight": lora.eetq.EetqLoraLinear,
    "TeWeight": lora.te.TeLinear,
}


def table() -> str:
    lines = [
        "| Format | LoRA class | DoRA's norm reads | Merging | Verified on | Remarks |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for form in sorted(FORMATS, key=lambda form: form.name.lower()):
        norm = "packed bytes" if reads_packed_bytes(form) else "rows"
        merging = "rounded anew" if merges(form) else "refused"
        lines.append(
            f"| {form.name} | `{lora_class(form).__name__}` | {norm} | {merging} | {form.verified or '—'} | {form.remark} |"
        )
    return "\n".join(lines)


def lora_class(form: Format) -> type[lora.LoraLayer]:
    """The layer that LoRA puts around one of these."""
    return _LORA_CLASSES.get(form.weight.__name__, lora.Linear)


def reads_packed_bytes(form: Format) -> bool:
    """Whether DoRA's norm reads a format's bytes with Triton, not rows of the dense matrix."""
    return form.weight.packed is not BaseWeight.packed


def merges(form: Format) -> bool:
    """Whether a matrix can be stored."""
    layer = SimpleNamespace(weight=type(form.tensor or "Tensor", (), {})())
    return form.weight.why_read_only(SimpleNamespace(layer=layer)) is None


if __name__ == "__main__":
    sys.exit(run(__doc__, [PAGE], BEGIN, END, table()))
