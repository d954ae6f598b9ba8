# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What each of two ranks does with LoRA on Megatron's parallel layers; run as a program, one process a rank."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

IN, OUT, RANKS = 8, 12, 2
CASES: dict[str, dict[str, Any]] = {
    f"{kind}{'-gathered' * gathered}{'-skip_bias' * skip}-{name}": {
        "kind": kind, "gathered": gathered, "skip": skip, "options": options
    }
    for kind in ("column", "row")
    for gathered, skip in ((False, False), (True, False), (False, True))
    for name, options in {
        "lora": {}, "gaussian": {"init_lora_weights": "gaussian"}, "dora": {"use_dora": True},
        "lora_bias": {"lora_bias": True}, "rslora": {"use_rslora": True},
    }.items()
}  # fmt: skip


class Model(nn.Module):
    """One parallel layer; gives the output with the bias, wherever that was added."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, bias = self.body(x)
        return y if bias is None else y + bias


def weights() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole weight, bias, input `[sequence, batch, in]` and gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = (OUT, IN), (OUT,), (5, 2, IN), (5, 2, OUT)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def fill(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole values for whole parameters, by name."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: 1 + 0.3 * torch.rand(p.shape, generator=generator)
        if "magnitude" in name
        else torch.randn(p.shape, generator=generator)
        for name, p in sorted(parameters.items())
    }


def shard_dims(kind: str) -> dict[str, int]:
    """The dimension that each tensor is cut along; those that are not here are whole."""
    if kind == "row":
        return {"weight": 1, "lora_A": 1}
    return {"weight": 0, "bias": 0, "lora_B": 0, "magnitude": 0}


def dim_of(kind: str, name: str) -> int | None:
    key = next((key for key in ("lora_A", "lora_B", "magnitude") if key in name), name.rpartition(".")[2])
    return shard_dims(kind).get(key)


def _run(case: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    import peft

    def cut(tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
        return tensor if dim is None else tensor.chunk(RANKS, dim)[rank].contiguous()

    kind, gathered = case["kind"], case["gathered"]
    settings = {
        "num_layers": 1, "hidden_size": IN, "num_attention_heads": 2, "tensor_model_parallel_size": RANKS,
        "use_cpu_initialization": True,
    }  # fmt: skip
    weight, bias, x, dy = weights()
    common = {"config": TransformerConfig(**settings), "init_method": nn.init.xavier_normal_, "bias": True}
    common["skip_bias_add"] = case["skip"]

    def make_base() -> nn.Module:
        if kind == "row":
            base = RowParallelLinear(IN, OUT, input_is_parallel=not gathered, **common)
        else:
            base = ColumnParallelLinear(IN, OUT, gather_output=gathered, **common)
        with torch.no_grad():
            base.weight.copy_(cut(weight, dim_of(kind, "weight")))
            base.bias.copy_(cut(bias, dim_of(kind, "bias")))
        return base

    torch.manual_seed(7 + rank)  # ranks need not draw alike
    if rank == 0:
        torch.manual_seed(7)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["body"], megatron_config=settings, **case["options"])
    model = peft.get_peft_model(Model(make_base()), config)
    layer = model.base_model.model.body
    start = {name: p.detach().clone() for name, p in layer.named_parameters() if "lora_" in name}
    whole = torch.load(folder / "values.pt")[case["name"]]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.copy_(cut(whole[name], dim_of(kind, name)))
    split_input = kind == "row" and not gathered
    split_output = kind == "column" and not gathered
    x = (cut(x, -1) if split_input else x).requires_grad_()
    y = model(x)
    y.backward(cut(dy, -1) if split_output else dy)
    grads = {name: p.grad for name, p in layer.named_parameters() if "lora_" in name}
    state = peft.get_peft_model_state_dict(model)
    adapters = str(folder / f"adapter-{case['name']}-{rank}")
    model.save_pretrained(adapters)
    loaded = peft.PeftModel.from_pretrained(Model(make_base()), adapters)
    with torch.no_grad():
        reread = loaded(x)
        model.merge_adapter()
        merged, merged_weight = model(x), layer.base_layer.weight.clone()
        model.unmerge_adapter()
        unmerged = model(x)
    results = {"y": y, "dx": x.grad, "grads": grads, "start": start, "merged": merged, "unmerged": unmerged,
               "weight": merged_weight, "state": state, "reread": reread}  # fmt: skip
    return _detached(results)


def _detached(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _detached(entry) for key, entry in value.items()}
    return value.detach().clone()


def main(rank: int, folder: Path, fake: bool) -> None:
    if fake:
        sys.path.insert(0, str(Path(__file__).parent / "fake_megatron"))
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    results = {
        name: _run({**case, "name": name}, rank, folder)
        for name, case in CASES.items()
        if fake or torch.cuda.is_available() or not case["gathered"]  # it gathers into CUDA tensors alone
    }
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "fake")
