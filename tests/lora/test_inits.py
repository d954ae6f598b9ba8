# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Starts of A and B: what each promises of the factors, and that base and adapter together stay the old weight."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import LoftQConfig, LoraConfig, PeftWarning, get_peft_model
from peft.weights import find_weight

TAKEN_OUT = ["pissa", "pissa_niter_4", "olora"]
ALPHA = 8


class Host(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


def adapted(body, kind, **settings):
    """The body with a LoRA adapter around it, in evaluation mode."""
    settings = {"r": 2, "lora_alpha": ALPHA, **settings}
    config = LoraConfig(target_modules=["body"], init_lora_weights=kind, **settings)
    model = get_peft_model(Host(body), config).eval()
    return model.base_model.model.body


def bodies():
    torch.manual_seed(0)
    return {
        "tall": nn.Linear(8, 16),
        "wide": nn.Linear(16, 8),
        "transposed": Conv1D(16, 8),
        "transposed square": Conv1D(8, 8),
        "double": nn.Linear(8, 16, dtype=torch.float64),
        "bfloat16": nn.Linear(8, 16, dtype=torch.bfloat16),
    }


def matrix(module):
    return find_weight(module).dense(torch.float64).clone()


def product(layer):
    a, b = layer.factors("default")
    return layer.scaling["default"] * b.detach().double() @ a.detach().double()


@pytest.mark.parametrize("shape", list(bodies()))
@pytest.mark.parametrize("kind", TAKEN_OUT)
def test_base_and_adapter_together_are_the_old_weight(kind, shape):
    body = bodies()[shape]
    before = matrix(body)
    layer = adapted(body, kind, fan_in_fan_out=isinstance(body, Conv1D))
    assert (matrix(body) - before).norm() > 0.05 * before.norm()
    tolerance = 4e-3 if shape == "bfloat16" else 1e-6
    torch.testing.assert_close(matrix(body) + product(layer), before, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", TAKEN_OUT)
def test_output_and_dora_magnitude_are_those_of_the_old_weight(kind):
    body = bodies()["tall"]
    x = torch.randn(3, 8)
    before, norm = body(x).detach(), body.weight.detach().norm(dim=1)
    layer = adapted(body, kind, use_dora=True)
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.detach(), norm)


def test_pissa_takes_the_largest_singular_values():
    body = bodies()["tall"]
    values = torch.linalg.svdvals(body.weight.detach())
    layer = adapted(body, "pissa")
    a, b = layer.factors("default")
    expected = torch.diag(values[:2]) / layer.scaling["default"]
    torch.testing.assert_close(a @ a.t(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(b.t() @ b, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(body.weight.detach())[:6], values[2:])


def test_olora_has_an_orthonormal_b():
    b = adapted(bodies()["wide"], "olora").factors("default")[1]
    torch.testing.assert_close(b.t() @ b, torch.eye(2))


def test_orthogonal_start_changes_nothing_and_trains_both_factors():
    body = bodies()["tall"]
    x = torch.randn(3, 8)
    before = body(x).detach()
    layer = adapted(body, "orthogonal", r=4)
    y = layer(x)
    torch.testing.assert_close(y, before)
    y.square().sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().max() > 0
    assert layer.lora_B["default"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["tall", "wide", "transposed"])
def test_mica_freezes_b_to_the_minor_singular_vectors(kind):
    body = bodies()[kind]
    layer = adapted(body, "mica", fan_in_fan_out=isinstance(body, Conv1D))
    a, b = layer.factors("default")
    minor = torch.linalg.svd(matrix(body), full_matrices=False)[0][:, -2:].float()
    torch.testing.assert_close((minor.t() @ b).abs(), torch.eye(2), atol=1e-4, rtol=0)
    assert not a.any()
    layer.set_adapter("default")
    assert layer.lora_A["default"].weight.requires_grad
    assert not layer.lora_B["default"].weight.requires_grad


def test_mica_on_an_embedding_trains_a_alone():
    layer = adapted(nn.Embedding(20, 8), "mica")
    assert layer.lora_embedding_A["default"].requires_grad
    assert not layer.lora_embedding_B["default"].requires_grad


@pytest.mark.parametrize("kind", TAKEN_OUT)
def test_a_rank_above_the_weights_keeps_the_configured_shape_and_the_output(kind):
    body = nn.Linear(4, 6)
    x = torch.randn(3, 4)
    before = body(x).detach()
    layer = adapted(body, kind, r=6)
    assert layer.lora_A["default"].weight.shape == (6, 4)
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize(("bits", "worst"), [(4, 0.06), (8, 0.004)])
def test_loftq_repairs_what_quantisation_loses(bits, worst):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    body = nn.Linear(64, 128)
    before = matrix(body)
    layer = adapted(body, "loftq", r=8, loftq_config=LoftQConfig(loftq_bits=bits, loftq_iter=2))
    quantised = (matrix(body) - before).norm()
    repaired = (matrix(body) + product(layer) - before).norm()
    assert repaired < 0.95 * quantised
    assert repaired < 2 * worst * before.norm()


def test_pissa_requantises_a_four_bit_base():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    body = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    body.load_state_dict({"weight": torch.randn(64, 64)})
    body = body.to("cpu")
    before = matrix(body)
    host = Host(body)
    host.is_loaded_in_4bit = True
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["body"], init_lora_weights="pissa")
    layer = get_peft_model(host, config).base_model.model.body
    after = matrix(body) + product(layer)
    assert not torch.equal(matrix(body), before)
    assert (after - before).norm() < 0.12 * before.norm()


@pytest.mark.parametrize(
    ("kind", "body", "settings", "message"),
    [
        ("orthogonal", nn.Linear(8, 8), {"r": 3}, "r=3 must be even"),
        ("mica", nn.Linear(4, 8), {"r": 6}, "r=6"),
        ("pissa", nn.Conv2d(4, 4, 3), {}, "Conv2d"),
        ("corda", nn.Linear(8, 8), {}, "preprocess_corda"),
    ],
)
def test_what_cannot_start_says_why(kind, body, settings, message):
    with pytest.raises(ValueError, match=message):
        adapted(body, kind, **settings)


def test_an_embedding_starts_plainly_with_a_warning():
    with pytest.warns(PeftWarning, match="Embedding"):
        layer = adapted(nn.Embedding(20, 8), "pissa")
    assert not layer.lora_embedding_A["default"].any()
