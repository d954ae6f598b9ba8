# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA+, LoRA-FA and Riemannian preconditioning against their papers' equations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer, _nearest_gradient

IDS = torch.tensor([[1, 5, 2], [0, 9, 5]])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 6)
        self.first = nn.Linear(6, 8)
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        return self.head(self.norm(self.first(self.emb(ids))))


def _adapted(**kwargs):
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["first"], "init_lora_weights": False, **kwargs}
    return get_peft_model(Model(), LoraConfig(**options))


def _backward(model) -> None:
    model.zero_grad()
    model(IDS).square().sum().backward()


def _names(model, group) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)].removeprefix("base_model.model.") for parameter in group["params"]}


# ---- LoRA+ ---------------------------------------------------------------------------------------------------------
def test_loraplus_groups():
    model = _adapted(target_modules=["first", "emb"], modules_to_save=["head", "norm"], bias="lora_only")
    options = {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 0.5, "betas": (0.8, 0.9)}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, **options)
    first, embedding, second, undecayed = optimizer.param_groups
    assert _names(model, first) == {"first.lora_A.default.weight", "head.modules_to_save.default.weight"}
    assert _names(model, embedding) == {"emb.lora_embedding_A.default", "emb.lora_embedding_B.default"}
    assert _names(model, second) == {"first.lora_B.default.weight"}
    assert _names(model, undecayed) == {
        "first.base_layer.bias",
        "head.modules_to_save.default.bias",
        "norm.modules_to_save.default.weight",
    }
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 0.5, 16e-3, 16e-3])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0]
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_loraplus_puts_magnitudes_with_b():
    model = _adapted(use_dora=True)
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2)
    assert isinstance(optimizer, torch.optim.SGD)
    assert _names(model, optimizer.param_groups[2]) == {
        "first.lora_B.default.weight",
        "first.lora_magnitude_vector.default.weight",
    }
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == trainable


def test_loraplus_takes_the_usual_weight_decay():
    optimizer = create_loraplus_optimizer(
        _adapted(), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, weight_decay=0.2
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.2, 0]


def test_loraplus_step():
    model = _adapted()
    layer = model.base_model.model.first
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before_a, before_b = a.detach().clone(), b.detach().clone()
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4)
    _backward(model)
    optimizer.step()
    torch.testing.assert_close(a, before_a - 0.1 * a.grad)
    torch.testing.assert_close(b, before_b - 0.4 * b.grad)


@pytest.mark.parametrize("ratio", [0, -16.0])
def test_loraplus_refuses(ratio):
    with pytest.raises(ValueError, match=f"loraplus_lr_ratio={ratio}"):
        create_loraplus_optimizer(_adapted(), torch.optim.SGD, lr=1.0, loraplus_lr_ratio=ratio)


# ---- LoRA-FA -------------------------------------------------------------------------------------------------------
def _adam(value, gradients, lr, decay, eps=1e-6):
    """AdamW in float64, with the bias correction in the step size."""
    mean = square = 0
    for step, gradient in enumerate(gradients, start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        rate = lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        value = value - rate * mean / (square**0.5 + eps)
        value = value - lr * decay * value
    return value


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"first": 2}}, {"use_dora": True}])
def test_lorafa_steps(options, decay):
    model = _adapted(modules_to_save=["head"], **options)
    layer = model.base_model.model.first
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    head = model.base_model.model.head.modules_to_save["default"].weight
    start_a, start_b, start_head = (tensor.detach().clone().double() for tensor in (a, b, head))
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2, weight_decay=decay)
    assert not a.requires_grad
    scaling = layer.scaling["default"]
    of_b, of_head = [], []
    for _ in range(3):
        _backward(model)
        of_b.append(b.grad.double() @ torch.linalg.inv(start_a @ start_a.T) / scaling**2)
        of_head.append(head.grad.double())
        optimizer.step()
    assert torch.equal(a.double(), start_a)
    torch.testing.assert_close(b.double(), _adam(start_b, of_b, 1e-2, decay), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.double(), _adam(start_head, of_head, 1e-2, decay), atol=1e-5, rtol=1e-5)


def test_lorafa_step_is_the_nearest_to_the_full_gradient():
    model = _adapted()
    layer = model.base_model.model.first
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    layer.base_layer.weight.requires_grad_(True)
    _backward(model)
    full, scaling = layer.base_layer.weight.grad, layer.scaling["default"]
    best = torch.linalg.lstsq((scaling * a).T.double(), full.T.double()).solution.T
    torch.testing.assert_close(_nearest_gradient(b.grad, a, scaling).double(), best, atol=1e-4, rtol=1e-4)


def test_lorafa_leaves_embeddings_trainable():
    model = _adapted(target_modules=["first", "emb"], init_lora_weights=True)
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2)
    _backward(model)
    optimizer.step()
    assert model.base_model.model.emb.lora_embedding_A["default"].any()


def test_lorafa_resumes():
    model = _adapted()
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2)
    _backward(model)
    optimizer.step()
    other = copy.deepcopy(model)
    resumed = create_lorafa_optimizer(other, r=3, lora_alpha=6, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (other, resumed)):
        _backward(one)
        its.step()
    b, other_b = (one.base_model.model.first.lora_B["default"].weight for one in (model, other))
    assert torch.equal(b, other_b)


def test_lorafa_with_a_closure_and_without_pairs():
    weight = nn.Parameter(torch.ones(2))
    optimizer = LoraFAOptimizer([weight], lr=0.1, correct_bias=False)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2
    torch.testing.assert_close(weight.data, torch.full((2,), 1 - 0.1 * 0.2 / (0.004**0.5 + 1e-6)))


def test_lorafa_refusals():
    with pytest.raises(ValueError, match="use_rslora=True contradicts"):
        create_lorafa_optimizer(_adapted(), r=3, lora_alpha=6, lr=1e-2, use_rslora=True)
    with pytest.warns(UserWarning, match="r=5 and lora_alpha=6 are not those"):
        create_lorafa_optimizer(_adapted(), r=5, lora_alpha=6, lr=1e-2)
    with pytest.raises(ValueError, match="no trainable lora_A and lora_B"):
        create_lorafa_optimizer(Model(), r=3, lora_alpha=6, lr=1e-2)
    weight = nn.Parameter(torch.ones(2))
    for option, value in (("lr", -1), ("betas", (2, 0.9)), ("eps", -1)):
        with pytest.raises(ValueError, match=option):
            LoraFAOptimizer([weight], **{option: value})


# ---- Riemannian preconditioning ------------------------------------------------------------------------------------
@pytest.mark.parametrize("reg", [1e-2, 0.5])
def test_riemannian_step(reg):
    model = _adapted(modules_to_save=["head"])
    layer = model.base_model.model.first
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    head = model.base_model.model.head.modules_to_save["default"].weight
    start = [tensor.detach().clone().double() for tensor in (a, b, head)]
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=reg)
    _backward(model)
    gradients = [tensor.grad.detach().clone().double() for tensor in (a, b, head)]
    optimizer.step()
    eye = torch.eye(3, dtype=torch.float64)
    step_a = torch.linalg.inv(start[1].T @ start[1] + reg * eye) @ gradients[0]
    step_b = gradients[1] @ torch.linalg.inv(start[0] @ start[0].T + reg * eye)
    for tensor, before, step in zip((a, b, head), start, (step_a, step_b, gradients[2]), strict=True):
        torch.testing.assert_close(tensor.double(), before - 0.1 * step, atol=1e-5, rtol=1e-4)


def test_riemannian_with_a_closure_steps_the_same():
    model = _adapted()
    other = copy.deepcopy(model)
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.1, weight_decay=0.0)
    with_closure = create_riemannian_optimizer(other, torch.optim.AdamW, lr=0.1, weight_decay=0.0)

    def closure():
        _backward(other)
        return torch.tensor(7.0)

    for _ in range(2):
        _backward(model)
        optimizer.step()
        assert with_closure.step(closure) == 7
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_riemannian_starts_from_a_b_of_zeros():
    model = _adapted(init_lora_weights=True)
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        _backward(model)
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.base_model.model.first.lora_B["default"].weight.any()


def test_riemannian_leaves_magnitudes_alone_and_does_convolutions():
    model = _adapted(use_dora=True)
    magnitude = model.base_model.model.first.lora_magnitude_vector["default"].weight
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)
    _backward(model)
    gradient = magnitude.grad.clone()
    optimizer.step()
    assert torch.equal(magnitude.grad, gradient)
    conv = get_peft_model(
        nn.Sequential(nn.Conv2d(2, 3, 3)), LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    )
    optimizer = create_riemannian_optimizer(conv, torch.optim.SGD, lr=0.1)
    conv(torch.randn(1, 2, 5, 5)).sum().backward()
    weight = conv.base_model.model[0].lora_A["default"].weight
    gradient, b = weight.grad.clone(), conv.base_model.model[0].lora_B["default"].weight.detach().flatten(1).clone()
    optimizer.step()
    truth = torch.linalg.inv(b.T @ b + 1e-2 * torch.eye(2)) @ gradient.flatten(1)
    torch.testing.assert_close(weight.grad.flatten(1), truth, atol=1e-4, rtol=1e-3)


def test_riemannian_refusals():
    with pytest.raises(ValueError, match="reg=0"):
        create_riemannian_optimizer(_adapted(), torch.optim.SGD, lr=1.0, reg=0)
    with pytest.raises(ValueError, match="both trainable"):
        create_riemannian_optimizer(Model(), torch.optim.SGD, lr=1.0)
    frozen = _adapted()
    create_lorafa_optimizer(frozen, r=3, lora_alpha=6, lr=1e-2)
    with pytest.raises(ValueError, match="both trainable"):
        create_riemannian_optimizer(frozen, torch.optim.SGD, lr=1.0)


@pytest.mark.parametrize("create", [create_loraplus_optimizer, create_riemannian_optimizer])
def test_training_with_a_gradient_scaler(create):
    options = {"loraplus_lr_ratio": 4.0} if create is create_loraplus_optimizer else {}
    model = _adapted()
    optimizer = create(model, torch.optim.SGD, lr=1e-3, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    other = copy.deepcopy(model)
    plain = create(other, torch.optim.SGD, lr=1e-3, **options)
    scaler.scale(model(IDS).square().sum()).backward()
    scaler.step(optimizer)
    _backward(other)
    plain.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
