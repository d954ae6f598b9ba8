# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Measures one case with one implementation in this process and prints the row's measured part as one line of JSON.

run.py starts it, with our sources or the upstream release first on the path. It imports `peft` only, never by place.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path

import torch
from registry import CASES, IMPLEMENTATIONS, PACKED, Case, Implementation
from rows import MARK, READY
from steps import SEED, adapter_name, loss_of, make_step, stored_dtype
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaMLP

WITHOUT_MASK = "sdpa_without_mask"


def attention_of(mode: str) -> str:
    """The attention's name for transformers. Under capture it would build a mask; without one SDPA is causal all the same."""
    if mode != "graph":
        return "sdpa"
    AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
    return WITHOUT_MASK


def llama_config(case: Case, mode: str) -> LlamaConfig:
    widths = case.widths
    return LlamaConfig(
        vocab_size=widths.vocab,
        hidden_size=widths.hidden,
        intermediate_size=widths.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=widths.heads,
        num_key_value_heads=widths.kv_heads,
        max_position_embeddings=max(case.seq, 2048),
        use_cache=False,
        tie_word_embeddings=False,
        attn_implementation=attention_of(mode),
    )


def nf4_linear(linear: nn.Linear, weight: torch.Tensor, storage: torch.dtype) -> nn.Module:
    """A bitsandbytes `Linear4bit` (NF4, nested scales, bf16 products) that keeps `weight` `[out, in]` in `storage`."""
    import bitsandbytes as bnb

    with torch.device("meta"):
        packed = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=storage,
        )
    parameter = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", quant_storage=storage, module=packed
    )
    packed.weight = parameter.to(weight.device)
    return packed


def gptq_linear(linear: nn.Linear, weight: torch.Tensor, group: int) -> nn.Module:
    """A gptqmodel `TorchLinear` of 4 bits in groups of `group`, with random codes in place of `weight` `[out, in]`."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    packed = TorchLinear(
        bits=4, group_size=group, sym=True, desc_act=False, in_features=linear.in_features,
        out_features=linear.out_features, bias=False,
    ).to(weight.device)  # fmt: skip
    packed.qweight.random_(-(2**31), 2**31)
    packed.qzeros.fill_(0x88888888 - 2**32)  # 8, eight times
    packed.scales = torch.full_like(packed.scales, weight.float().std().item() / 4.61, dtype=weight.dtype)
    return packed.train()


def hqq_linear(linear: nn.Linear, weight: torch.Tensor, group: int) -> nn.Module:
    """An `HQQLinear` of 4 bits in groups of `group` that keeps `weight` `[out, in]`, rounded to nearest."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=group)
    config["weight_quant_params"]["optimize"] = False
    dense = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    return HQQLinear(dense, config, compute_dtype=weight.dtype, device=str(weight.device))


def packed_linear(linear: nn.Linear, weight: torch.Tensor, case: Case, storage: torch.dtype) -> nn.Module:
    """A layer of the case's base that stands for `weight` `[out, in]`."""
    if case.base == "nf4":
        return nf4_linear(linear, weight, storage)
    return {"gptq": gptq_linear, "hqq": hqq_linear}[case.base](linear, weight, case.group)


@torch.no_grad()
def materialize(model: nn.Module, case: Case, storage: torch.dtype) -> None:
    """Gives the parameters of a model on the meta device seeded random values, made on the case's device, one by one.

    No second copy of the model ever exists, so that 70B in NF4 needs no more memory than it keeps.
    """
    generator = torch.Generator(case.device).manual_seed(SEED)
    dtype = stored_dtype(case)
    replaced: set[nn.Module] = set()
    for module in list(model.modules()):
        if module in replaced:
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, device=case.device, dtype=dtype)
            if parameter.dim() == 1:
                value.fill_(1.0)
            else:
                value.normal_(0.0, 0.02, generator=generator)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, child in list(module.named_children()):
            if case.base in PACKED and isinstance(child, nn.Linear) and name in case.targets:
                replaced.add(child)
                weight = torch.empty(child.weight.shape, device=case.device, dtype=dtype)
                weight.normal_(0.0, 0.02, generator=generator)
                setattr(module, name, packed_linear(child, weight, case, storage))


def build_base(case: Case, storage: torch.dtype = torch.uint8, mode: str = "eager") -> nn.Module:
    """The frozen base of `case` on its device; NF4's bytes are kept in `storage`."""
    config = llama_config(case, mode)
    with torch.device("meta"):
        model = LlamaMLP(config) if case.mlp else LlamaForCausalLM(config)
    materialize(model, case, storage)
    if not case.mlp:
        # Its buffers are computed, not stored, and so are none of materialize's business.
        with torch.device(case.device):
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if case.base == "nf4":
        model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    if case.kind != "train":
        return model.eval()
    if not case.mlp:
        if case.checkpointing:
            # A stream that is being captured cannot tell the state of its generator; nothing here draws from it.
            options = {"use_reentrant": False, "preserve_rng_state": mode != "graph"}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    return model.train()


def add_adapter(model: nn.Module, case: Case, implementation: Implementation) -> nn.Module:
    """Wraps `model` by whichever `peft` is imported; both packages start from the same factors, and so do the same."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, target_modules=list(case.targets), **implementation.config
    )
    model = get_peft_model(model, config)
    for i in range(1, case.adapters):
        model.add_adapter(adapter_name(i), config)
    seed_factors(model, case.device, branch=case.kind != "train")
    return model if case.kind == "train" else model.eval()


def seed_factors(model: nn.Module, device: str, branch: bool = False) -> None:
    """Gives every A of an adapted model the same start, whichever package made it: normal, of variance 1/in.

    With `branch` B gets values too, so that the branch adds something.
    """
    generator = torch.Generator(device).manual_seed(SEED + 1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        elif "lora_B" in name and branch:
            nn.init.normal_(parameter, std=0.02, generator=generator)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"


def allocated_mib(device: str) -> tuple[float, float]:
    """Memory `(now, at its peak)` in MiB: PyTorch's allocator on a GPU, this process's resident memory on a CPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    import psutil

    now = psutil.Process().memory_info().rss / 2**20
    if sys.platform == "win32":
        return now, psutil.Process().memory_info().peak_wset / 2**20
    import resource

    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def timed_steps(step, case: Case, mode: str = "eager") -> dict:
    """Runs the case's steps; times in ms (`times_ms`), losses, and the memory peak over the timed steps.

    What a captured step uses the allocator counts while it is captured: that peak is over all steps.
    """
    synchronize = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    start, _ = allocated_mib(case.device)
    losses, times = [], []
    for i in range(case.warm + case.steps):
        if i == case.warm and case.device == "cuda" and mode != "graph":
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        begin = time.perf_counter()
        result = step()
        synchronize()
        if i >= case.warm:
            times.append(1e3 * (time.perf_counter() - begin))
        losses.append(loss_of(result, case))
        del result
    _, peak = allocated_mib(case.device)
    quantiles = torch.quantile(torch.tensor(times, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double())
    p20, p50, p80 = (round(value, 3) for value in quantiles.tolist())
    return {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "times_ms": [round(value, 3) for value in times],
        "peak_mib": round(peak - start if case.mlp else peak, 1),
        "losses": [round(value, 6) for value in losses],
    }


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions_of(implementation: Implementation, source: Path) -> dict[str, str | None]:
    """The versions that a row names; checks that `peft`, where it is used, is the package meant.

    Raises:
        RuntimeError: if ours was meant and another was imported, or the other way round.
    """
    versions = {name: installed(name) for name in ("torch", "triton", "transformers", *PACKED.values())}
    versions["python"] = platform.python_version()
    if implementation.package is not None:
        import peft

        place = Path(peft.__file__).resolve()
        if place.is_relative_to(source) != (implementation.package == "ours"):
            raise RuntimeError(
                f"{implementation.name} wants the peft of {implementation.package}, but `peft` is {place}"
            )
        versions["peft"] = peft.__version__
    return versions


def measure(case: Case, implementation: Implementation, source: Path) -> dict:
    if case.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"case {case.name} needs a GPU, and torch sees none")
    torch.manual_seed(SEED)
    model = build_base(case, mode=implementation.mode)
    if implementation.package is not None:
        model = add_adapter(model, case, implementation)
    row = timed_steps(make_step(model, case, implementation.mode), case, implementation.mode)
    row["device"] = device_name(case.device)
    row["versions"] = versions_of(implementation, source)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("implementation", choices=IMPLEMENTATIONS)
    parser.add_argument("--source", type=Path, required=True, help="the folder that holds our `peft`")
    parser.add_argument("--wait", action="store_true", help="import, say so, and wait for a line before anything else")
    arguments = parser.parse_args()
    case, implementation = CASES[arguments.case], IMPLEMENTATIONS[arguments.implementation]
    if arguments.wait:
        for name in filter(None, (PACKED.get(case.base), "peft" if implementation.package else None)):
            importlib.import_module(name)
        print(READY, flush=True)
        if not sys.stdin.readline():
            sys.exit("whoever was to give this process its turn is gone")
    row = measure(case, implementation, arguments.source.resolve())
    print(MARK + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
