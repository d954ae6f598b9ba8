# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Factors of an adapter as DTensors that are cut as transformers' plan of tensor parallelism cuts the base layer.

The layers here keep their factors whole and use a part of them (`layer.parallel`), so nothing calls this when an adapter
is made; it is for those who shard the factors of large ranks themselves. Needs transformers 5.23 or newer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .layer.embedding import LoraEmbeddingATPHolder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# By style: the dimension that it cuts, and what base layer and factor call the size of that dimension.
_CUTS = {
    "colwise": (0, "out_features"),
    "rowwise": (1, "in_features"),
    "embedding_rowwise": (0, "num_embeddings"),
}


def get_tp_plan_and_mesh(model: nn.Module, current_key: str) -> tuple[str | None, DeviceMesh | None]:
    """The style in which a model's plan of tensor parallelism splits a module, and the mesh it is split over.

    Args:
        model: The base model; one that `from_pretrained` split has a plan and a mesh.
        current_key: The module's dotted name in it.

    Returns:
        Both None where the model is not split or the plan leaves the module whole.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return None, None
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    style = (model.tp_plan or {}).get(replace_layer_number_by_wildcard(current_key))
    if style is None:
        return None, None
    return style, mesh["tp"] if mesh.ndim > 1 else mesh


def add_lora_tp_hooks_dtensor(
    tp_module: nn.Module, tp_plan_name: str, device_mesh: DeviceMesh, *, base_layer: nn.Module, module_name: str
) -> None:
    """Cut a factor's weight as its base layer's is, and make its calls take and give parts accordingly.

    Args:
        tp_module: What is cut: B `[out, r]` for "colwise", which then gives this rank's output features; A `[r, in]` for
            "rowwise", which then takes this rank's input features and sums over the ranks; a `LoraEmbeddingATPHolder`
            `[num_embeddings, r]` for "embedding_rowwise". Whole on every rank, or this rank's part already.
        tp_plan_name: That style, as `get_tp_plan_and_mesh` gives it.
        device_mesh: The ranks to cut over, a mesh of one dimension.
        base_layer: The adapted layer; its size decides whether `tp_module` is whole.
        module_name: Name of `tp_module` in the model, for errors.

    Raises:
        ValueError: The style cuts no factor, or the factor has neither the whole size nor this rank's.
    """
    if tp_plan_name not in _CUTS or (tp_plan_name[0] == "e") != isinstance(tp_module, LoraEmbeddingATPHolder):
        raise ValueError(
            f"tp_plan_name={tp_plan_name!r} does not cut {module_name} ({type(tp_module).__name__}): linear factors are "
            "cut by 'colwise' and 'rowwise', the A of an embedding by 'embedding_rowwise'. Leave it whole."
        )
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    axis, size = _CUTS[tp_plan_name]
    style = ALL_PARALLEL_STYLES[tp_plan_name]
    if tp_module.weight.shape[axis] == getattr(base_layer, size):
        for parameter in ("weight", "bias"):
            style.shard_param(tp_module, parameter, device_mesh)
    else:
        _adopt_parts(tp_module, axis, getattr(base_layer, size), device_mesh, module_name)
    setattr(tp_module, size, getattr(base_layer, size))
    style.install_forward(tp_module, device_mesh)


def _adopt_parts(module: nn.Module, axis: int, size: int, mesh: DeviceMesh, name: str) -> None:
    """Take what each rank holds for its part of parameters whose whole size along `axis` is given."""
    from torch.distributed.tensor import DTensor, Shard

    start, end = _own_range(size, mesh)
    if module.weight.shape[axis] != end - start:
        raise ValueError(
            f"{name}: dimension {axis} of its weight has {module.weight.shape[axis]} entries; give it the {size} of the "
            f"whole base layer, or the {end - start} of this rank."
        )
    for key, parameter in list(module.named_parameters(recurse=False)):
        whole = torch.empty([size if i == axis else n for i, n in enumerate(parameter.shape)], device="meta")
        cut = DTensor.from_local(
            parameter.data, mesh, [Shard(axis)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        module.register_parameter(key, nn.Parameter(cut, requires_grad=parameter.requires_grad))


def _own_range(size: int, mesh: DeviceMesh) -> tuple[int, int]:
    """The entries of `size` that this rank holds, by torch's rule for chunks."""
    chunk = -(-size // mesh.size())
    start = min(mesh.get_local_rank() * chunk, size)
    return start, min(start + chunk, size)
