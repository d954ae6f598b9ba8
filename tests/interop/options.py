# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Every option of `LoraConfig` that changes what an adapter is: one row each, from which those on NF4 bases and those under
DoRA are made, or that says why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import models
import torch
from torch import nn

import cases
import peft
import quantisers
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig

_IN_GROUPS = cases.Format("gptq", torch.float32, "gptq", settings={"bits": 4, "group_size": 16})
_IDS = torch.tensor([[5, 3, 9, 1, 7, 2], [4, 4, 8, 30, 6, 2]])


# ---- bases -----------------------------------------------------------------------------------------------------------
class Two(nn.Module):
    """Two linear layers, plain or 4-bit, whose inputs and outputs are in groups that differ in strength."""

    def __init__(self, form: str = "fp32") -> None:
        super().__init__()
        if form == "nf4":
            import bitsandbytes as bnb

            # multiples of 64, the size of a block: on some CPUs bitsandbytes packs weights anew for inference
            sizes = {"compute_dtype": torch.float32, "quant_type": "nf4"}
            self.first = bnb.nn.Linear4bit(64, 128, **sizes)
            self.second = bnb.nn.Linear4bit(128, 64, **sizes)
            self.is_loaded_in_4bit = True
        else:
            self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.register_buffer("strength", torch.linspace(2, 0.2, 64), persistent=False)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x * self.strength)))


class TwoInGroups(nn.Module):
    """A layer that gptqmodel's library holds in 4-bit groups of 16, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = quantisers.QUANTISERS["gptq"].build(nn.Linear(64, 128).requires_grad_(False), _IN_GROUPS)
        self.second = nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Experts(nn.Module):
    """A module whose weights are bare parameters of two and three dimensions."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 8) / 3)
        self.down = nn.Parameter(torch.randn(3, 8, 12) / 3)
        self.mix = nn.Parameter(torch.randn(10, 8) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(torch.einsum("...i,eoi->...eo", x, self.up))
        return torch.einsum("...ei,eoi->...o", hidden, self.down) @ self.mix.t()


class Mixture(nn.Module):
    """Experts between two linear layers."""

    def __init__(self, experts: type[Experts] = Experts) -> None:
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(64, 8), experts(), nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.experts(self.first(x)))


class TransposedExperts(Experts):
    """The same with stacks `[experts, in, out]`, which transformers' experts say by this attribute."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(p.detach().mT.contiguous()) for p in (self.up, self.down))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(torch.einsum("...i,eio->...eo", x, self.up))
        return torch.einsum("...ei,eio->...o", hidden, self.down) @ self.mix.t()


class Attention(nn.Module):
    """Self-attention with a packed in-projection, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def _llama_nf4(tied: bool = False) -> nn.Module:
    """A Llama whose decoder layers are in 4 bits, as transformers loads it; of sizes that are multiples of a block."""
    import bitsandbytes as bnb
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=models.VOCAB, tie_word_embeddings=tied, **sizes))
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in [(n, m) for n, m in block.named_children() if isinstance(m, nn.Linear)]:
                held = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                held.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
                setattr(block, name, held)
    model.is_loaded_in_4bit = True
    return model


def _gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads))


def _embedded() -> nn.Module:
    return nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 12))


BASES: dict[str, Callable[[], nn.Module]] = {
    "two": Two,
    "two-nf4": lambda: Two("nf4"),
    "two-gptq": TwoInGroups,
    "two-conv1d": lambda: nn.Sequential(nn.Linear(64, 10), cases.LAYERS["transformers_conv1d"].build()),
    "convolved": lambda: nn.Sequential(nn.Unflatten(-1, (4, 4, 4)), nn.Conv2d(4, 6, 3)),
    "embedded": _embedded,
    "mixture": Mixture,
    "mixture-transposed": lambda: Mixture(TransposedExperts),
    "attention": Attention,
    "llama": models.BASES["llama"],
    "llama-nf4": _llama_nf4,
    "llama-tied": models.BASES["llama-tied"],
    "llama-tied-nf4": lambda: _llama_nf4(tied=True),
    "gpt-oss": _gpt_oss,
}
# Why options on these have no row on NF4: bitsandbytes holds the weights of linear layers in 4 bits and no others.
NO_NF4 = {
    "two-gptq": "its layers are in another format",
    "two-conv1d": "transformers' Conv1D is no linear layer",
    "convolved": "a convolution is no linear layer",
    "embedded": "an embedding is no linear layer",
    "mixture": "bare parameters are no linear layers",
    "mixture-transposed": "bare parameters are no linear layers",
    "gpt-oss": "bare parameters are no linear layers",
    "attention": "an attention reads the weights of its projections itself",
}


def base_and_input(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A base model, the same one each time, and an input: token ids, or `[2, 5, 64]`."""
    torch.manual_seed(0)
    base = BASES[name]().eval()
    if name.endswith("nf4"):
        base = base.to("cpu")  # which is when bitsandbytes quantises
    if name.startswith(("llama", "embedded", "gpt-oss")):
        return base, _IDS
    shape = (6, 64) if name == "convolved" else (2, 5, 64)
    return base, torch.randn(shape, generator=torch.Generator().manual_seed(1))


# ---- what comes before and after the adapter is made -----------------------------------------------------------------
def _corda(base: nn.Module, config: LoraConfig, x: torch.Tensor) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    generator = torch.Generator().manual_seed(2)
    batches = torch.randn(4, 1, 200, 64, generator=generator)
    preprocess_corda(base, config, run_model=lambda: [base(batch) for batch in batches])


def _lora_ga(base: nn.Module, config: LoraConfig, x: torch.Tensor) -> None:
    from peft.tuners.lora import preprocess_loraga

    preprocess_loraga(base, config, lambda: base(x).square().sum().backward())


def _eva(model: nn.Module, x: torch.Tensor) -> None:
    peft.initialize_lora_eva_weights(
        model,
        [x + step for step in (0.0, 0.1, 0.2)],
        forward_fn=lambda module, inputs: module(inputs),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: (inputs[0] if isinstance(inputs, tuple) else inputs).flatten(0, -2),
        show_progress_bar=False,
    )


@dataclass(frozen=True)
class Option:
    """A base and the config that goes on it.

    Args:
        base: Key of `BASES`.
        options: Arguments of the `LoraConfig`.
        before: Called with the base, the config and an input before the adapter is made.
        after: Called with the model and an input afterwards.
        drawn: Whether the start draws random numbers that upstream draws otherwise: no numbers are compared.
        signs: Whether the start is made of singular vectors, whose signs nobody chooses.
        room: By how much products BA of the start may differ, in parts of the largest, where they come from an
            iteration or a decomposition of something ill-conditioned; factors alone differ by 100 times as much.
        low_cpu_mem: Whether loading onto meta starts from the same numbers.
        merges: Whether the adapter can be merged.
        refused: Name of the error that both sides raise when the adapter is made, several joined by `|`.
        there: Name of the error that upstream alone raises, several joined by `|`.
        trains_there: Whether upstream's adapter can be trained on a CPU after its start.
        wrong: Parts of the results that upstream gets wrong, each with a test in test_faults.py.
        merges_there: Whether upstream's adapter can be merged; it can be here.
        less_there: Whether upstream leaves an option out without a word: it has other parameters.
        nf4: What is different on the base's NF4 form.
        dora: What is different with DoRA on top; None for no such row.
    """

    base: str
    options: dict[str, Any]
    before: Callable[[nn.Module, LoraConfig, torch.Tensor], None] | None = None
    after: Callable[[nn.Module, torch.Tensor], None] | None = None
    drawn: bool = False
    signs: bool = False
    room: float = 0.0
    low_cpu_mem: bool = True
    merges: bool = True
    refused: str = ""
    there: str = ""
    trains_there: bool = True
    wrong: tuple[str, ...] = ()
    merges_there: bool = True
    less_there: bool = False
    nf4: dict[str, Any] = field(default_factory=dict)
    dora: dict[str, Any] | None = None

    @property
    def package(self) -> str | None:
        """What must be installed besides what the tests need."""
        return "gptqmodel" if self.base.endswith("gptq") else None

    @property
    def quantised(self) -> bool:
        return self.base.endswith(("nf4", "gptq"))

    def config(self) -> LoraConfig:
        defaults = {"r": 4, "lora_alpha": 6}
        if self.base.startswith("llama"):
            defaults |= {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
        return LoraConfig(**{**defaults, **self.options})


def _two(_facts: dict[str, Any] | None = None, _base: str = "two", **options: Any) -> Option:
    return Option(_base, {"target_modules": ["first", "second"], **options}, **(_facts or {}))


def _with_dora(rows: dict[str, Option]) -> dict[str, Option]:
    """The rows, and those with DoRA."""
    more = {
        f"{name}-dora": replace(
            row, options={**row.options, "use_dora": True}, dora=None,
            **{**row.dora, "nf4": {**row.nf4, **row.dora.get("nf4", {})}},
        )
        for name, row in rows.items()
        if row.dora is not None
    }  # fmt: skip
    return {**rows, **more}


def _with_nf4(rows: dict[str, Option]) -> dict[str, Option]:
    """The rows, and those on the NF4 form of their base."""
    more = {
        f"{name}-nf4": replace(row, base=f"{row.base}-nf4", nf4={}, **row.nf4)
        for name, row in rows.items()
        if row.base not in NO_NF4
    }
    return {**rows, **more}


_BD = {"target_modules_bd_a": ["first"], "target_modules_bd_b": ["second"], "nblocks": 2}
_TOKENS = [1, 5, 30]
_SIGNS: dict[str, Any] = {"signs": True, "dora": {}}
_EVA: dict[str, Any] = {**_SIGNS, "after": _eva, "room": 0.0005, "nf4": {"trains_there": False}}
_CORDA: dict[str, Any] = {**_SIGNS, "before": _corda, "room": 0.002, "nf4": {"there": "RuntimeError"}}
_GA: dict[str, Any] = {
    **_SIGNS, "before": _lora_ga, "room": 1e-5, "low_cpu_mem": False, "nf4": {"refused": "ValueError"},
}  # fmt: skip
# The release adds the update of the out-projection twice, and draws its start twice.
_TWICE: dict[str, Any] = {"drawn": True, "wrong": ("y", "grads", "eval", "merged", "unmerged", "unloaded")}
# Its get_delta_weight of a block-diagonal factor has another shape than the weight, or raises.
_SHAPELESS: dict[str, Any] = {"wrong": ("products",), "nf4": {"less_there": True}}
# Its layers of GPTQ neither merge nor tell their update.
_IN_GROUPS_THERE: dict[str, Any] = {"merges_there": False, "wrong": ("products",)}
# It writes the name of the embedding that the named layer is tied to.
_RENAMED: dict[str, Any] = {"wrong": ("modules_to_save",)}
# Both refuse it, over one argument or another.
_EITHER: dict[str, Any] = {"nf4": {"refused": "TypeError|ValueError"}}
_UNREAD: dict[str, Any] = {"nf4": {"there": "TypeError"}, "dora": {}}  # its start cannot read a packed weight
_DREW: dict[str, Any] = {"drawn": True, "dora": {}}
STARTS: dict[str, Option] = {
    "pissa": _two({**_SIGNS, **_UNREAD}, init_lora_weights="pissa"),
    "pissa-niter": _two({**_UNREAD, **_DREW}, init_lora_weights="pissa_niter_4"),
    "pissa-rslora": _two({**_SIGNS, **_UNREAD}, init_lora_weights="pissa", use_rslora=True),
    "olora": _two({**_SIGNS, "dora": {}}, init_lora_weights="olora"),
    "orthogonal": _two({**_DREW, "nf4": {"there": "RuntimeError"}}, init_lora_weights="orthogonal"),
    "orthogonal-odd": _two({"refused": "ValueError"}, init_lora_weights="orthogonal", r=3),
    "mica": _two(
        {**_SIGNS, "nf4": {"there": "TypeError"}, "dora": {"refused": "ValueError", **_EITHER}},
        init_lora_weights="mica",
    ),
    "random": _two({"dora": {}}, init_lora_weights=False),
    "gaussian": _two({"dora": {}}, init_lora_weights="gaussian"),
    # the release runs LoftQ on CUDA alone, and with scipy
    "loftq": _two(
        {"drawn": True, "low_cpu_mem": False, "there": "AssertionError|ImportError|RuntimeError", "dora": {}},
        init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4, loftq_iter=1),
    ),
    "eva": _two(_EVA, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)),
    "eva-rho1": _two(_EVA, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)),
    "eva-whiten": _two(
        _EVA, init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0, whiten=True, adjust_scaling_factors=False),
    ),
    **{
        f"corda-{method}": _two(_CORDA, init_lora_weights="corda", corda_config=CordaConfig(corda_method=method))
        for method in ("ipm", "kpm")
    },
    **{
        f"loraga-{direction}-{scale}": _two(
            {**_GA, "drawn": scale == "weight_svd"}, init_lora_weights="lora_ga",
            lora_ga_config=peft.LoraGAConfig(direction=direction, scale=scale),
        )
        for direction, scale in (
            ("ArBr", "stable"), ("A2rBr", "unit"), ("ArB2r", "gd_scale"), ("ArB2r", "weight_svd"),
        )
    },
    "gaussian-embedding": Option(
        "embedded", {"target_modules": ["0", "1"], "init_lora_weights": "gaussian"}, dora={}
    ),
    "mica-embedding": Option("embedded", {"target_modules": ["0"], "init_lora_weights": "mica"}, signs=True),
    "pissa-conv1d": Option(
        "two-conv1d", {"target_modules": ["1"], "fan_in_fan_out": True, "init_lora_weights": "pissa"}, signs=True,
        dora={},
    ),
}  # fmt: skip
VARIANTS: dict[str, Option] = {
    "rslora": _two({"dora": {}}, use_rslora=True),
    "patterns": _two({"dora": {}}, rank_pattern={"first": 2}, alpha_pattern={"second": 11}),
    "bias-lora-only": _two({"dora": {}}, bias="lora_only"),
    "bias-all": _two({"dora": {}}, target_modules=["second"], bias="all"),
    "dropout": _two({"dora": {}}, lora_dropout=0.3),
    "one-layer": _two({"dora": {}}, target_modules="all-linear", exclude_modules=["second"]),
    "module-saved": _two({"dora": {}, "nf4": {"refused": "RuntimeError"}}, target_modules=["first"], modules_to_save=["second"]),
    "lora-bias": _two(
        {"nf4": {"wrong": ("merged",)}, "dora": {"there": "ValueError"}},
        target_modules=["first"], lora_bias=True, init_lora_weights=False,
    ),
    "conv-lora-bias": Option("convolved", {"target_modules": ["1"], "lora_bias": True}, dora={"there": "ValueError"}),
    "kasa": _two({"nf4": {"less_there": True}}, kasa_config=peft.KasaConfig(beta=0.1, gamma=0.2)),
    "monteclora": _two(
        {"drawn": True, "low_cpu_mem": False, "nf4": {"less_there": True}},
        monteclora_config=peft.MontecloraConfig(num_samples=4, buffer_size=2),
    ),
    "bdlora": _two(_SHAPELESS, use_bdlora=peft.BdLoraConfig(**_BD)),
    "bdlora-loose": _two(
        _SHAPELESS, use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["second"], nblocks=4, match_strict=False)
    ),
    "bdlora-strict": _two({"refused": "ValueError", "nf4": {"less_there": True}}, use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["first"])),
    **{
        f"velora-{start}": _two(
            {"nf4": {"there": "ValueError"}},
            velora_config=peft.VeloraConfig(num_groups=8, init_type=start, scale=0.5),
        )
        for start in ("batch_average", "batch_average_once", "random")
    },
    **{
        f"qalora-{name}": _two(_IN_GROUPS_THERE, "two-gptq", target_modules=["first"], use_qalora=True, **options)
        for name, options in (
            ("16", {}), ("32", {"qalora_group_size": 32}), ("dropout", {"qalora_group_size": 8, "lora_dropout": 0.3}),
        )
    },
    "qalora-odd": _two(
        {"refused": "ValueError"}, "two-gptq", target_modules=["first"], use_qalora=True, qalora_group_size=13
    ),
    "gptq": _two(_IN_GROUPS_THERE, "two-gptq"),
    "qalora-plain": _two(use_qalora=True),
    "alora": Option(
        "llama", {"alora_invocation_tokens": [9, 1]}, merges=False,
        dora={"there": "ValueError", "nf4": {"there": "", "less_there": True}},
    ),
    "alora-absent": Option("llama", {"alora_invocation_tokens": [17]}, merges=False),
}  # fmt: skip
REFUSED: dict[str, Option] = {
    f"refused-{name}-{value}": _two({"refused": error, **(_EITHER if "niter" in str(value) else {})}, **{name: value})
    for name, value, error in (
        ("r", 0, "ValueError"), ("r", -1, "ValueError"), ("r", 2.5, "TypeError"), ("lora_dropout", 2.0, "ValueError"),
        ("lora_dropout", "much", "TypeError"), ("bias", "some", "NotImplementedError"),
        ("init_lora_weights", "pisa", "ValueError"), ("init_lora_weights", "pissa_niter_x", "ValueError"),
        ("init_lora_weights", "PISSA", "ValueError"), ("init_lora_weights", "Orthogonal", "ValueError"),
    )
}  # fmt: skip
# Its merges go into weights that several layers share.
_SHARED: dict[str, Any] = {"wrong": ("merged", "unmerged", "unloaded")}
# Its tied factors are parameters of their own in one memory, counted and stepped twice, and merged twice.
_TIED: dict[str, Any] = {
    "wrong": ("counts", "parameters", "grads", "merged", "unmerged", "unloaded", "target_modules"),
}
TARGETS: dict[str, Option] = {
    "layers": Option("llama", {"layers_to_transform": [0, 2], "layers_pattern": "layers"}, dora={}),
    # with DoRA its repeated 4-bit layers no longer share their weights
    "replication": Option(
        "llama", {"layer_replication": [(0, 2), (1, 3)]}, **_SHARED,
        dora={"nf4": {"wrong": (*_SHARED["wrong"], "counts")}},
    ),  # fmt: skip
    "tokens": Option("llama", {"trainable_token_indices": _TOKENS}, dora={}),
    "tokens-named": Option("llama", {"trainable_token_indices": {"embed_tokens": _TOKENS}}),
    "tokens-alone": Option(
        "llama", {"target_modules": [], "trainable_token_indices": _TOKENS}, there="NoMatchingPeftModuleError"
    ),
    "tokens-beside-nothing": Option(
        "llama", {"target_modules": ["nothing"], "trainable_token_indices": _TOKENS}, refused="NoMatchingPeftModuleError"
    ),
    "tokens-tied": Option("llama-tied", {"trainable_token_indices": _TOKENS}, dora={}),
    "tokens-both": Option("llama", {"trainable_token_indices": {"embed_tokens": _TOKENS, "lm_head": [2]}}),
    "tied-saved": Option(
        "llama-tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, **_RENAMED
    ),
    "tied-head-saved": Option(
        "llama-tied", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, **_RENAMED
    ),
    **{
        f"tied-saved-{saved}-other-adapted{'-tied' * tied}": Option(
            "llama-tied",
            {"target_modules": ["q_proj", target], "modules_to_save": [saved], "ensure_weight_tying": tied},
            refused="TypeError" if tied and saved == "embed_tokens" else "",
            dora={},
            **(_RENAMED if tied else {}),
        )
        for saved, target in (("embed_tokens", "lm_head"), ("lm_head", "embed_tokens"))
        for tied in (False, True)
    },
    **{
        f"tied-adapted-{name}": Option(
            "llama-tied", {"target_modules": ["q_proj", name], "ensure_weight_tying": True}, dora={}, **_TIED
        )
        for name in ("embed_tokens", "lm_head")
    },
    "parameters": Option(
        "mixture", {"target_modules": [], "target_parameters": ["experts.up"]}, dora={"there": "ValueError"}
    ),
    "parameters-beside-nothing": Option(
        "mixture", {"target_modules": ["nothing"], "target_parameters": ["experts.up"]}
    ),
    "parameters-beside-defaults": Option("llama", {"target_modules": None, "target_parameters": ["lm_head.weight"]}),
    "parameters-all": Option(
        "mixture", {"target_modules": ["last"], "target_parameters": ["experts.up", "experts.down", "experts.mix"]}
    ),
    "parameters-patterns": Option(
        "mixture",
        {
            "target_modules": [], "target_parameters": ["experts.up", "experts.down"], "rank_pattern": {"experts.up": 2},
            "alpha_pattern": {"experts.down": 9}, "use_rslora": True,
        },
    ),
    "parameters-random": Option(
        "mixture", {"target_modules": [], "target_parameters": ["experts.down"], "init_lora_weights": False}
    ),
    "parameters-transposed": Option(
        "mixture-transposed",
        {"target_modules": [], "target_parameters": ["experts.up", "experts.down", "experts.mix"], "r": 3},
    ),
    "parameters-gpt-oss": Option(
        "gpt-oss", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    ),
    "parameters-eva": Option(
        "mixture", {"target_modules": ["last"], "target_parameters": ["experts.up"], "init_lora_weights": "eva"},
        after=_eva, drawn=True, there="RuntimeError",
    ),  # fmt: skip
    "attention": Option("attention", {"target_modules": ["attention"]}, **_TWICE),
    "attention-and-head": Option("attention", {"target_modules": ["attention", "head"], "use_rslora": True}, **_TWICE),
}  # fmt: skip
OPTIONS: dict[str, Option] = _with_nf4(_with_dora({**STARTS, **VARIANTS, **REFUSED, **TARGETS}))
