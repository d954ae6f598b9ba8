# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Megatron's parallel layers on two ranks compute, learn and merge what one uncut layer does.

Run with a stand-in that is built to megatron-core's documented interface, and with megatron-core where it is installed.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron_ranks import CASES, IN, OUT, RANKS, dim_of, fill, weights
from torch import nn

import peft

HERE = Path(__file__).resolve().parent
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(IN, OUT)

    def forward(self, x):
        return self.body(x)


def uncut(options):
    weight, bias, _, _ = weights()
    model = Model()
    with torch.no_grad():
        model.body.weight.copy_(weight)
        model.body.bias.copy_(bias)
    torch.manual_seed(7)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["body"], **options))


def lora_parameters(model):
    return {n: p for n, p in model.base_model.model.body.named_parameters() if "lora_" in n}


@pytest.fixture(
    scope="module",
    params=[
        "fake",
        pytest.param(
            "megatron-core",
            marks=pytest.mark.skipif(
                not importlib.util.find_spec("megatron"), reason="megatron-core is not installed"
            ),
        ),
    ],
)
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    values = {name: fill(lora_parameters(uncut(case["options"]))) for name, case in CASES.items()}
    torch.save(values, folder / "values.pt")
    command = [sys.executable, str(HERE / "megatron_ranks.py")]
    running = [
        subprocess.Popen([*command, str(rank), str(folder), request.param], stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(errors)[-3000:]
    return values, [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def joined(results, name, part, dim):
    pieces = [result[name][part] for result in results]
    if dim is None:
        torch.testing.assert_close(pieces[0], pieces[1])
        return pieces[0]
    return torch.cat(pieces, dim)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_layer(name, ranks):
    values, results = ranks
    if name not in results[0]:
        pytest.skip("megatron-core gathers on CUDA alone")
    case = CASES[name]
    kind = case["kind"]
    model = uncut(case["options"])
    parameters = lora_parameters(model)
    for key, parameter in parameters.items():
        pieces = [result[name]["start"] for result in results]
        dim = dim_of(kind, key)
        found = pieces[0][key] if dim is None else torch.cat([piece[key] for piece in pieces], dim)
        if "lora_A" in key and kind == "column":  # drawn by the first rank, given to the others
            torch.testing.assert_close(pieces[1][key], pieces[0][key])
        if "magnitude" in key:
            torch.testing.assert_close(found, parameter.detach(), **TOLERANCE)
        assert found.shape == parameter.shape
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(values[name][key])
    _, _, x, dy = weights()
    x.requires_grad_()
    y = model(x)
    y.backward(dy)
    split_output = -1 if kind == "column" and not case["gathered"] else None
    split_input = -1 if kind == "row" and not case["gathered"] else None
    for part in ("y", "reread", "merged", "unmerged"):
        torch.testing.assert_close(joined(results, name, part, split_output), y.detach(), **TOLERANCE)
    if split_input is not None or kind == "column":
        torch.testing.assert_close(joined(results, name, "dx", split_input), x.grad, **TOLERANCE)
    for key, parameter in parameters.items():
        pieces = [result[name]["grads"][key] for result in results]
        dim = dim_of(kind, key)
        if dim is None:
            torch.testing.assert_close(pieces[0], pieces[1], **TOLERANCE)
        found = pieces[0] if dim is None else torch.cat(pieces, dim)
        torch.testing.assert_close(found, parameter.grad, **TOLERANCE)
    model.merge_adapter()
    merged = joined(results, name, "weight", dim_of(kind, "weight"))
    torch.testing.assert_close(merged, model.base_model.model.body.base_layer.weight.detach(), **TOLERANCE)


@pytest.mark.parametrize("name", ["column-dora", "row-lora_bias"])
def test_files_have_the_keys_of_an_uncut_layer(name, ranks):
    _, results = ranks
    expected = peft.get_peft_model_state_dict(uncut(CASES[name]["options"]))
    assert results[0][name]["state"].keys() == expected.keys()


def test_only_megatron_is_imported():
    config = peft.LoraConfig(target_modules=["body"], megatron_config={"hidden_size": 8}, megatron_core="os")
    with pytest.raises(ValueError, match="megatron_core='os'"):
        peft.get_peft_model(Model(), config)


@pytest.mark.skipif(bool(importlib.util.find_spec("megatron")), reason="megatron-core is installed")
def test_without_megatron_the_remedy_is_named():
    config = peft.LoraConfig(target_modules=["body"], megatron_config={"hidden_size": 8})
    with pytest.raises(ImportError, match="pip install megatron-core"):
        peft.get_peft_model(Model(), config)
