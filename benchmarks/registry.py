# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What is measured: the cases, the implementations, the goals, and what arithmetic and traffic alone predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Widths:
    """A Llama-shaped decoder's widths: those of one layer, and the vocabulary that all cases of a size share."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int = 32_000

    def linears(self) -> dict[str, tuple[int, int]]:
        """`(out, in)` of the linear layers of one decoder layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }


LLAMA_8B = Widths(4096, 14336, 32, 8)
LLAMA_70B = Widths(8192, 28672, 64, 8)
TINY = Widths(64, 160, 4, 2, vocab=512)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """One step to measure.

    `base` is how the frozen weights are stored: `"bf16"`, `"fp32"`, `"nf4"` (nested scales), `"gptq"` or `"hqq"` (4 bits,
    `group` elements a scale); the packed ones compute in bf16. A step of `kind` `"train"` runs `accumulation`
    micro-batches of `batch` × `seq` tokens forward and backward, then the optimizer; one of `"prefill"` runs `batch` ×
    `seq` tokens forward, one of `"decode"` a token of each of `batch` sequences that have `seq` tokens behind them.
    `steps` are timed after `warm` that are not. `mlp` is one SwiGLU block without a model around it; its memory is
    counted from the start of the step. With several `adapters` the rows of a batch have them in turn.
    """

    name: str
    what: str
    widths: Widths
    layers: int
    base: str
    batch: int
    seq: int
    rank: int
    checkpointing: bool
    device: str = "cuda"
    accumulation: int = 1
    mlp: bool = False
    group: int = 64
    warm: int = 3
    steps: int = 8
    kind: str = "train"
    adapters: int = 1

    @property
    def tokens(self) -> int:
        return self.batch * (1 if self.kind == "decode" else self.seq) * self.accumulation

    @property
    def targets(self) -> tuple[str, ...]:
        return MLP if self.mlp else ATTENTION + MLP


@dataclass(frozen=True)
class Implementation:
    """Who computes: `package` is `"ours"`, `"upstream"` or None (the frozen base alone); `config` is for LoraConfig.

    `mode` is how: `"eager"`, `"graph"` (the step is captured into a CUDA graph and replayed) or `"compiled"` (each decoder
    layer by torch.compile).
    """

    name: str
    package: str | None
    config: dict[str, bool]
    mode: str = "eager"


@dataclass(frozen=True)
class Goal:
    """`implementation` takes at most `time` × and `memory` × what `against` takes; `at_most_ms` is absolute."""

    case: str
    implementation: str
    against: str | None
    time: float | None = None
    memory: float | None = None
    at_most_ms: float | None = None
    less_mib: float | None = None


def decode(name: str, base: str, batch: int, adapters: int = 1) -> Case:
    """A case of decoding at 8B widths: one token of each sequence of a batch."""
    what = "a token" if batch == 1 else f"a token of {batch} sequences"
    what += f", 512 of context, 8B×8, {'NF4' if base == 'nf4' else base}, r 16"
    what += "" if adapters == 1 else f", {adapters} adapters in the batch"
    return Case(
        name, what, LLAMA_8B, 8, base, batch, 512, 16, False, warm=8, steps=30, kind="decode", adapters=adapters
    )


CASES = {
    case.name: case
    for case in (
        Case("c1", "8B×8, bf16, 4,096 tokens, r 16, checkpointing", LLAMA_8B, 8, "bf16", 1, 4096, 16, True),
        Case("c2", "8B×8, bf16, 4 × 1,024 tokens, r 16", LLAMA_8B, 8, "bf16", 1, 1024, 16, False, accumulation=4),
        Case("c3", "8B×8, bf16, 4,096 tokens, r 384, checkpointing", LLAMA_8B, 8, "bf16", 1, 4096, 384, True),
        Case("c4", "8B×8, NF4, 4 × 1,024 tokens, r 12, checkpointing", LLAMA_8B, 8, "nf4", 1, 1024, 12, True, accumulation=4),
        Case("c5", "70B×2, NF4, 4 × 1,024 tokens, r 12, checkpointing", LLAMA_70B, 2, "nf4", 1, 1024, 12, True, accumulation=4),
        Case(
            "c4-gptq", "as c4, GPTQ of 4 bits by 128 (gptqmodel's layer, random codes)", LLAMA_8B, 8, "gptq", 1, 1024, 12, True,
            accumulation=4, group=128,
        ),
        Case(
            "c4-hqq", "as c4, HQQ of 4 bits by 64 (hqq's layer, rounded without its search)", LLAMA_8B, 8, "hqq", 1, 1024, 12,
            True, accumulation=4,
        ),
        Case("m1", "one SwiGLU MLP, bf16, 4,096 tokens, r 16", LLAMA_8B, 1, "bf16", 1, 4096, 16, False, mlp=True, warm=10, steps=30),
        Case(
            "70b", "70B×80, NF4, 4 × 1,024 tokens, r 12, checkpointing", LLAMA_70B, 80, "nf4", 1, 1024, 12, True,
            accumulation=4, warm=1, steps=3,
        ),
        Case(
            "cpu", "one SwiGLU MLP of 1,024 × 2,816 on the CPU, fp32, 256 tokens, r 16", Widths(1024, 2816, 16, 16), 1, "fp32",
            1, 256, 16, False, "cpu", mlp=True, warm=5, steps=30,
        ),
        decode("d1", "bf16", 1),
        decode("d1b8", "bf16", 8),
        decode("d1b64", "bf16", 64),
        decode("d1x2", "bf16", 8, adapters=2),
        decode("d2", "nf4", 1),
        decode("d2b8", "nf4", 8),
        decode("d2b64", "nf4", 64),
        Case("d3", "prefill of 2,048 tokens, 8B×8, bf16, r 16", LLAMA_8B, 8, "bf16", 1, 2048, 16, False, steps=15, kind="prefill"),
        Case("tiny", "a tiny decoder on the CPU, fp32, r 4", TINY, 2, "fp32", 1, 32, 4, False, "cpu"),
        Case("tiny-bf16", "a tiny decoder on the CPU, bf16, r 4, checkpointing", TINY, 2, "bf16", 1, 32, 4, True, "cpu"),
        Case("tiny-nf4", "a tiny decoder on the CPU, NF4, r 4", TINY, 2, "nf4", 1, 32, 4, False, "cpu", accumulation=2),
        Case("tiny-gptq", "a tiny decoder on the CPU, GPTQ, r 4", TINY, 2, "gptq", 1, 32, 4, True, "cpu", group=32),
        Case("tiny-hqq", "a tiny decoder on the CPU, HQQ, r 4", TINY, 2, "hqq", 1, 32, 4, True, "cpu", group=32),
        Case("tiny-mlp", "a tiny SwiGLU MLP on the CPU, fp32, r 4", TINY, 1, "fp32", 1, 32, 4, False, "cpu", mlp=True),
        Case("tiny-decode", "a token of a tiny decoder on the CPU, fp32, r 4", TINY, 2, "fp32", 1, 16, 4, False, "cpu", kind="decode"),
        Case(
            "tiny-decode-x2", "a token of 4 sequences with 2 adapters, a tiny decoder on the CPU, fp32, r 4", TINY, 2, "fp32",
            4, 16, 4, False, "cpu", kind="decode", adapters=2,
        ),
        Case("tiny-prefill", "prefill of a tiny decoder on the CPU, bf16, r 4", TINY, 2, "bf16", 1, 32, 4, False, "cpu", kind="prefill"),
    )
}  # fmt: skip

IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("floor", None, {}),
        Implementation("upstream-lora", "upstream", {}),
        Implementation("upstream-dora", "upstream", {"use_dora": True}),
        Implementation("lora", "ours", {}),
        Implementation("dora", "ours", {"use_dora": True}),
        Implementation("dora-triton", "ours", {"use_dora": True, "use_dora_triton": True}),
        Implementation("dora-triton-graph", "ours", {"use_dora": True, "use_dora_triton": True}, "graph"),
        Implementation("dora-triton-compiled", "ours", {"use_dora": True, "use_dora_triton": True}, "compiled"),
    )
}
EAGER = [name for name, implementation in IMPLEMENTATIONS.items() if implementation.mode == "eager"]
# What a plain run measures of a case: all eager ones, but for these. The full 70B has one comparison to make, and each of
# its steps is long; upstream refuses two DoRA adapters in one batch.
IMPLEMENTATIONS_OF = {
    "70b": ["upstream-dora", "dora-triton"],
    "cpu": ["upstream-lora", "upstream-dora", "lora", "dora"],
    "c4-gptq": ["lora", "dora", "dora-triton"],
    "c4-hqq": ["lora", "dora", "dora-triton"],
    "d1x2": ["upstream-lora", "lora", "dora", "dora-triton"],
    "tiny-decode-x2": ["upstream-lora", "lora", "dora"],
    **dict.fromkeys(("c1", "c4", "d1", "d2"), [*EAGER, "dora-triton-graph", "dora-triton-compiled"]),
}
# The package whose layers hold a packed base, of half a byte an element.
PACKED = {"nf4": "bitsandbytes", "gptq": "gptqmodel", "hqq": "hqq"}

GOALS = (
    Goal("c1", "dora-triton", "upstream-lora", time=0.78, memory=1.0),
    Goal("c2", "dora-triton", "upstream-lora", time=0.75, memory=1.0),
    Goal("c3", "dora-triton", "upstream-lora", time=0.85, memory=1.0),
    Goal("c4", "dora-triton", "upstream-lora", time=0.65, memory=1.0),
    Goal("c5", "dora-triton", "upstream-lora", time=0.80, memory=1.0),
    Goal("c1", "lora", "upstream-lora", time=0.85),
    Goal("c4", "lora", "upstream-lora", time=0.85),
    Goal("c4-gptq", "dora-triton", "lora", time=1.15),
    Goal("c4-hqq", "dora-triton", "lora", time=1.15),
    Goal("m1", "dora-triton", None, at_most_ms=5.6),
    Goal("cpu", "dora", "upstream-dora", time=0.60, memory=0.60),
    Goal("70b", "dora-triton", "upstream-dora", time=0.40, less_mib=4500),
    Goal("c4", "dora-triton-graph", "upstream-lora", time=0.45),
    Goal("c4", "dora-triton-compiled", "upstream-lora", time=0.45),
    *(Goal(name, "dora-triton", "upstream-lora", time=0.55, memory=1.0) for name in ("d1", "d1b8", "d1b64", "d1x2")),
    *(Goal(name, "dora-triton", "upstream-lora", time=0.60, memory=1.0) for name in ("d2", "d2b8", "d2b64")),
    Goal("d3", "dora-triton", "upstream-lora", time=0.70, memory=1.0),
)

# What losses.py trains in (the base's dtype, and autocast's where it is a low one), and how far from upstream's its
# curve of losses may be, as the mean of |Δ| over the steps. arXiv 2603.22276 reports 7.1e-4 for its kernels.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSS_BOUND = 5e-4
LOSS_STEPS = 500
LOSS_GAIN = 0.05  # the least part by which the loss must fall, so that a curve of nothing proves nothing

# Attained by plain PyTorch on an H100 SXM: bf16 products of these sizes, and copies within its memory.
H100_FLOPS = 700e12
H100_BYTES = 3.0e12


def implementations_of(case: Case) -> list[str]:
    """The names of the implementations that a plain run measures of `case`."""
    return IMPLEMENTATIONS_OF.get(case.name, EAGER)


def predict_ms(case: Case, implementation: Implementation) -> float | None:
    """The milliseconds that products and traffic of one step must take on an H100, host and attention left out.

    It is written down with each row before the measurement, so that a row says how far from the hardware it stands.
    Only our implementations and the floor are predicted. Per linear layer and micro-batch of T tokens: the base costs
    2·T·out·in operations forward (twice under checkpointing) and as much backward; the branch 2·T·r·(in + out) forward
    and twice that backward. Our branch adds one read and write of the output forward, and DoRA's backward reads dy
    and y and writes g∘dy; a norm reads W once a step. A quantised weight is dequantised once a direction. Without a
    backward pass the forward part alone counts, and for a few tokens that the weights are read.
    """
    if implementation.package == "upstream" or case.device != "cuda":
        return None
    operations, traffic = 0.0, 0.0
    for name, (rows, columns) in case.widths.linears().items():
        if name in case.targets:
            layer = _predict_training(case, implementation, rows, columns)
            if case.kind != "train":
                layer = _predict_inference(case, implementation, rows, columns)
            operations, traffic = operations + layer[0], traffic + layer[1]
    layers, head = case.layers, case.widths.hidden * case.widths.vocab
    if case.kind != "train":
        operations += 2 * case.batch * head / layers  # the logits of each sequence's last token
        traffic += 2 * head / layers
    elif not case.mlp:
        # The head's product forward and backward, and the fp32 logits with their softmax and gradient.
        operations += 4 * case.tokens * head / layers
        traffic += 5 * case.tokens * case.widths.vocab * 4 / layers
    return 1e3 * layers * (operations / H100_FLOPS + traffic / H100_BYTES)


def _predict_training(case: Case, implementation: Implementation, rows: int, columns: int) -> tuple[float, float]:
    """Operations and bytes of one linear layer in a training step."""
    tokens = case.tokens
    forwards = 2 if case.checkpointing else 1
    operations = 2 * tokens * rows * columns * (forwards + 1)
    traffic = (forwards + 1) * case.accumulation * rows * columns * 2.5 if case.base in PACKED else 0.0
    if implementation.package is None:
        return operations, traffic
    operations += 2 * tokens * case.rank * (rows + columns) * (forwards + 2)
    traffic += forwards * 2 * tokens * rows * 2
    if implementation.config.get("use_dora"):
        traffic += 3 * tokens * rows * 2
        traffic += rows * columns * (0.5 if case.base in PACKED else 2)
    return operations, traffic


def _predict_inference(case: Case, implementation: Implementation, rows: int, columns: int) -> tuple[float, float]:
    """Operations and bytes of one linear layer in a forward pass alone."""
    operations = 2 * case.tokens * rows * columns
    traffic = rows * columns * (0.5 if case.base in PACKED else 2)
    if implementation.package is not None:
        operations += 2 * case.tokens * case.rank * (rows + columns)
        traffic += 4 * case.adapters * case.rank * (rows + columns)  # float32 factors, looked at in every pass
    return operations, traffic
