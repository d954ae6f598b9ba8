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
    """One training step to measure.

    `base` is how the frozen weights are stored: `"bf16"`, `"fp32"`, `"nf4"` (nested scales), `"gptq"` or `"hqq"` (4 bits,
    `group` elements a scale); the packed ones compute in bf16. A step runs `accumulation` micro-batches of `batch` × `seq` tokens. `steps` are timed after `warm` that are not. `mlp`
    is one SwiGLU block without a model around it; its memory is counted from the start of the step.
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

    @property
    def tokens(self) -> int:
        return self.batch * self.seq * self.accumulation

    @property
    def targets(self) -> tuple[str, ...]:
        return MLP if self.mlp else ATTENTION + MLP


@dataclass(frozen=True)
class Implementation:
    """Who computes: `package` is `"ours"`, `"upstream"` or None (the frozen base alone); `config` is for LoraConfig."""

    name: str
    package: str | None
    config: dict[str, bool]


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
        Case("tiny", "a tiny decoder on the CPU, fp32, r 4", TINY, 2, "fp32", 1, 32, 4, False, "cpu"),
        Case("tiny-bf16", "a tiny decoder on the CPU, bf16, r 4, checkpointing", TINY, 2, "bf16", 1, 32, 4, True, "cpu"),
        Case("tiny-nf4", "a tiny decoder on the CPU, NF4, r 4", TINY, 2, "nf4", 1, 32, 4, False, "cpu", accumulation=2),
        Case("tiny-gptq", "a tiny decoder on the CPU, GPTQ, r 4", TINY, 2, "gptq", 1, 32, 4, True, "cpu", group=32),
        Case("tiny-hqq", "a tiny decoder on the CPU, HQQ, r 4", TINY, 2, "hqq", 1, 32, 4, True, "cpu", group=32),
        Case("tiny-mlp", "a tiny SwiGLU MLP on the CPU, fp32, r 4", TINY, 1, "fp32", 1, 32, 4, False, "cpu", mlp=True),
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
    )
}
# What a plain run measures of a case; the full 70B has one comparison to make, and each of its steps is long.
IMPLEMENTATIONS_OF = {
    "70b": ["upstream-dora", "dora-triton"],
    "cpu": ["upstream-lora", "upstream-dora", "lora", "dora"],
    "c4-gptq": ["lora", "dora", "dora-triton"],
    "c4-hqq": ["lora", "dora", "dora-triton"],
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
)

# What losses.py trains in (the base's dtype, and autocast's where it is a low one), and how far from upstream's its
# curve of losses may be, as the mean of |Δ| over the steps. arXiv 2603.22276 reports 7.1e-4 for its kernels.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSS_BOUND = 5e-4
LOSS_STEPS = 500
LOSS_GAIN = 0.1  # the least part by which the loss must fall, so that a curve of nothing proves nothing

# Attained by plain PyTorch on an H100 SXM: bf16 products of these sizes, and copies within its memory.
H100_FLOPS = 700e12
H100_BYTES = 3.0e12


def implementations_of(case: Case) -> list[str]:
    """The names of the implementations that a plain run measures of `case`."""
    return IMPLEMENTATIONS_OF.get(case.name, list(IMPLEMENTATIONS))


def predict_ms(case: Case, implementation: Implementation) -> float | None:
    """The milliseconds that products and traffic of one step must take on an H100, host and attention left out.

    It is written down with each row before the measurement, so that a row says how far from the hardware it stands.
    Only our implementations and the floor are predicted. Per linear layer and micro-batch of T tokens: the base costs
    2·T·out·in operations forward (twice under checkpointing) and as much backward; the branch 2·T·r·(in + out) forward
    and twice that backward. Our branch adds one read and write of the output forward, and DoRA's backward reads dy
    and y and writes g∘dy; a norm reads W once a step. A quantised weight is dequantised once a direction.
    """
    if implementation.package == "upstream" or case.device != "cuda":
        return None
    tokens = case.tokens
    forwards = 2 if case.checkpointing else 1
    operations, traffic = 0.0, 0.0
    for name, (rows, columns) in case.widths.linears().items():
        if name not in case.targets:
            continue
        operations += 2 * tokens * rows * columns * (forwards + 1)
        stored = 0.5 if case.base in PACKED else 2
        if case.base in PACKED:
            traffic += (forwards + 1) * case.accumulation * rows * columns * (stored + 2)
        if implementation.package is None:
            continue
        operations += 2 * tokens * case.rank * (rows + columns) * (forwards + 2)
        traffic += forwards * 2 * tokens * rows * 2
        if implementation.config.get("use_dora"):
            traffic += 3 * tokens * rows * 2
            traffic += rows * columns * stored
    layers = case.layers
    if not case.mlp:
        # The head's product forward and backward, and the fp32 logits with their softmax and gradient.
        operations += 4 * tokens * case.widths.hidden * case.widths.vocab / layers
        traffic += 5 * tokens * case.widths.vocab * 4 / layers
    return 1e3 * layers * (operations / H100_FLOPS + traffic / H100_BYTES)
