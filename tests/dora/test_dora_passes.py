# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A pass over a model brings the factors of all its layers up to date at once, and never with old values."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peft import LoraConfig, dora, get_peft_model, inject_adapter_in_model
from peft.dora import factors, passes
from peft.tuners.lora import LoraLayer

WIDTH = 32


class Net(nn.Module):
    """Four layers; they can be checkpointed, left out, or called twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=i == 2) for i in range(4)])
        self.order = [0, 1, 2, 3]
        self.reentrant = None

    def forward(self, x, fails=False):
        for i in self.order:
            layer = self.layers[i]
            if self.reentrant is None:
                x = torch.tanh(layer(x))
            else:
                x = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, use_reentrant=self.reentrant)
        if fails:
            raise RuntimeError("on purpose")
        return x


@pytest.fixture(params=[True, False], ids=["dora", "lora"])
def model(body, request, monkeypatch):
    if body.route.path != "triton":
        pytest.skip("the kernels' passes")
    monkeypatch.setattr(LoraLayer, "dora_route", lambda self, name: body.route)
    # One body for all passes, with and without gradient: a reentrant checkpoint has both.
    monkeypatch.setattr(factors.kernels(), "MOST_TOKENS", 0)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["layers.0", "layers.1", "layers.2", "layers.3"], use_dora=request.param,
        use_dora_triton=request.param, init_lora_weights=False, rank_pattern={"layers.1": 6},
    )  # fmt: skip
    return get_peft_model(Net(), config).to(body.device)


def net_of(model):
    return model.base_model.model


def x_of(model, rows=5):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, WIDTH, generator=generator).to(next(model.parameters()).device).requires_grad_()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def results(model, call=None):
    """Output and gradients of one step."""
    x = x_of(model)
    for p in trained(model):
        p.grad = None
    y = (call or model)(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *[p.grad.clone() for p in trained(model)]]


def alone(model):
    """The same, layer by layer, without any memory."""
    fresh = copy.deepcopy(model)
    fresh.base_model.model.reentrant = None
    dora.unwatch_passes(net_of(fresh))
    return results(fresh, net_of(fresh))


def check(model):
    for found, expected in zip(results(model), alone(model), strict=True):
        assert torch.equal(found, expected)


@pytest.fixture
def refreshes(monkeypatch):
    """The number of members of every batch that is brought up to date."""
    seen = []
    original = factors.kernels().Batch.refresh

    def refresh(self, *args, **kwargs):
        seen.append(len(self.members))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(factors.kernels().Batch, "refresh", refresh)
    return seen


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    from peft.dora.kernels.launch import Launch

    seen = []
    original = Launch.__call__

    def launch(self, *tensors):
        seen.append(self.function.fn.__name__ if hasattr(self.function, "fn") else self.function.__name__)
        original(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", launch)
    return seen


def test_one_refresh_a_pass(model, refreshes):
    check(model)  # the first pass learns what the layers ask for
    refreshes.clear()
    results(model)
    # one batch a rank, and whether the gain is lifted: not where the layer has a bias
    assert sorted(refreshes) == ([1, 1, 2] if model.peft_config["default"].use_dora else [4])
    check(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(model, refreshes, reentrant):
    check(model)
    net_of(model).reentrant = reentrant
    for _ in range(3):
        check(model)
        for p in trained(model):
            p.data.mul_(1.01)
    refreshes.clear()
    results(model)
    batches = 3 if model.peft_config["default"].use_dora else 1
    assert len(refreshes) == 2 * batches  # forward, and once in the backward pass


def test_every_write_between_passes_is_seen(model):
    for step in range(3):
        check(model)
        torch.optim.AdamW(trained(model), lr=0.1, fused=True).step()
        check(model)
        with torch.no_grad():
            trained(model)[step].data.view(-1)[0] += 1.0
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()})
    check(model)
    net_of(model).layers[1].scaling["default"] *= 2
    check(model)


def step_of(make):
    """A change: one step of the optimizer that `make` makes."""

    def change(model):
        net_of(model)(x_of(model)).square().sum().backward()
        make(trained(model)).step()

    return change


def adamw_8bit(parameters):
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.optim.AdamW8bit(parameters, lr=0.1, min_8bit_size=16)


def write_data(model):
    trained(model)[0].data.view(-1)[-1] += 1.0


def load(model):
    state = {name: value * 1.5 if "lora" in name else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def change_rank(model):
    config = copy.deepcopy(model.peft_config["default"])
    config.r, config.rank_pattern = 5, {}
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")


CHANGES = {
    "torch's fused AdamW": step_of(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True)),
    "AdamW8bit": step_of(adamw_8bit),
    ".data": write_data,
    "load_state_dict": load,
    "another adapter": lambda model: model.set_adapter("other"),
    "another rank": change_rank,
    "scaling": lambda model: net_of(model).layers[1].set_scale("default", 3.0),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default' was active and is deleted")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_the_next_forward(body, change, monkeypatch):
    """On every body, through the model as a user calls it."""
    monkeypatch.setattr(LoraLayer, "dora_route", lambda self, name: body.route)
    torch.manual_seed(0)
    targets = ["layers.0", "layers.1", "layers.2", "layers.3"]
    config = LoraConfig(r=4, target_modules=targets, use_dora=True, init_lora_weights=False)
    model = get_peft_model(Net(), config).to(body.device)
    model.add_adapter("other", copy.deepcopy(config))
    model.to(body.device)
    before = [results(model)[0] for _ in range(2)]
    assert torch.equal(*before)
    CHANGES[change](model)
    model.to(body.device)
    check(model)
    assert not torch.equal(results(model)[0], before[0])


def test_layers_called_outside_of_a_pass(model):
    check(model)
    layer = net_of(model).layers[3]
    for _ in range(3):
        trained(model)[-1].data.add_(0.5)
        layer.lora_A["default"].weight.data.add_(0.5)
        y, expected = layer(x_of(model)), copy.deepcopy(layer)(x_of(model))
        assert torch.equal(y, expected)
        check(model)


def test_layers_left_out_and_called_twice(model):
    for order in ([0, 1, 2, 3], [0, 3], [0, 0, 1, 2, 3, 1], [3, 2, 1, 0], [1]):
        net_of(model).order = order
        for p in trained(model):
            p.data.mul_(1.1)
        x = x_of(model)
        expected = copy.deepcopy(model)
        dora.unwatch_passes(net_of(expected))
        assert torch.equal(model(x), net_of(expected)(x))


def test_an_error_ends_the_pass(model):
    check(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(x_of(model), fails=True)
    trained(model)[0].data.add_(1.0)
    layer = net_of(model).layers[0]
    assert torch.equal(layer(x_of(model)), copy.deepcopy(layer)(x_of(model)))
    check(model)


def test_adapters_come_and_go(model):
    check(model)
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("other", config)
    check(model)
    model.set_adapter("other")
    check(model)
    results(model)
    with model.disable_adapter():
        model(x_of(model))
    check(model)
    model.delete_adapter("other")
    model.set_adapter("default")
    check(model)
    model.merge_adapter()
    model.unmerge_adapter()
    check(model)


def test_moved_parameters(model):
    check(model)
    for _ in range(8):
        for p in trained(model):
            p.data = p.data.clone() * 1.01
        check(model)


def test_weights_that_are_gathered_for_each_pass(model, launches, monkeypatch):
    """As FSDP leaves them: all of a layer lies elsewhere at each pass, and W may be another one without a trace."""
    from peft.dora.kernels.launch import Kernel

    for layer in net_of(model).layers:
        layer.base_layer._is_fsdp_managed_module = True
    check(model)
    made = []
    for kind, name in ((factors.kernels().Batch, "__init__"), (Kernel, "prepare")):
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, f=original, **kwargs: (made.append(f), f(*args, **kwargs))[1])
    for _ in range(3):
        for p in model.parameters():
            p.data = p.data.clone() * 1.01
        check(model)
        made.clear()
        launches.clear()
        results(model)
        assert not made
        assert launches.count("norms_fwd_kernel") == (4 if model.peft_config["default"].use_dora else 0)
        assert "cast_fwd_kernel" not in launches  # there is nothing to compare with


@pytest.mark.parametrize("part", ["W", "factors"])
def test_views_that_begin_anywhere(body, part):
    """As FSDP's flat parameters have them."""
    if body.route.path != "triton":
        pytest.skip("the kernels' passes")
    config = LoraConfig(r=4, target_modules=["layers.0"], use_dora=True, use_dora_triton=True, init_lora_weights=False)
    model = get_peft_model(Net(), config, autocast_adapter_dtype=False).to(body.device, torch.float16)
    expected = model(x_of(model).half())
    moved = [p for name, p in model.named_parameters() if ("base_layer" in name) == (part == "W")]
    for p in moved:
        flat = torch.empty(p.numel() + 1, dtype=p.dtype, device=p.device)
        flat[1:] = p.detach().flatten()
        p.data = flat[1:].view(p.shape)
        assert p.data_ptr() % 4 == 2
    for _ in range(2):
        torch.testing.assert_close(model(x_of(model).half()), expected)  # cuBLAS takes other kernels then


def test_copies_and_pickles(model):
    check(model)
    check(copy.deepcopy(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    check(torch.load(buffer, weights_only=False))


def test_a_model_without_a_wrapper(body, refreshes):
    if body.route.path != "triton":
        pytest.skip("the kernels' passes")
    config = LoraConfig(r=4, target_modules=["layers.0", "layers.1"], use_dora=True, use_dora_triton=True)
    net = inject_adapter_in_model(config, Net()).to(body.device)
    x = torch.randn(3, WIDTH, device=body.device)
    net(x)
    refreshes.clear()
    net(x)
    assert refreshes == [2]


def test_unloading_leaves_no_hook(model):
    results(model)
    net = model.unload()
    assert not net._forward_hooks and not net._forward_pre_hooks and not net._forward_hooks_always_called


def test_the_wider_memory_is_let_go(model):
    """After a pass without gradient nothing of its copies is left."""
    model.half()
    with torch.no_grad():
        x = x_of(model).detach().half()
        model(x)
        model(x)
    for chunk in passes._passes[net_of(model)].chunks:
        assert chunk.factors is None


def test_norms_are_kept_once(model):
    """Who is in a chunk keeps none of its own, and makes some anew when it is called outside of a pass."""
    check(model)
    caches = passes.caches_of(net_of(model))
    assert all(cache.batch is not None for cache in caches)
    check(model)
    assert len(caches) == 4 and all(cache.batch is None and cache.shared is not None for cache in caches)
    layer, x = net_of(model).layers[0], x_of(model)
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    assert caches[0].batch is not None


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_many_chunks(model, refreshes, monkeypatch, reentrant):
    """As with large ranks: every layer is a chunk of its own, and few of them are open at a time."""
    monkeypatch.setattr(passes, "CHUNK_BYTES", 1)
    check(model)
    net_of(model).reentrant = reentrant
    for _ in range(2):
        check(model)
        for p in trained(model):
            p.data.mul_(1.01)
    known = passes._passes[net_of(model)]
    kinds = {chunk.kind for chunk in known.chunks}
    assert len(known.chunks) == 4 and len(known.open) <= passes.MOST_OPEN * len(kinds)
    refreshes.clear()
    results(model)
    assert set(refreshes) == {1}


class Products(TorchDispatchMode):
    """Counts the products that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.removeprefix("aten::") in ("mm", "addmm", "addmm_", "linear", "matmul")
        return function(*args, **(kwargs or {}))


def test_launches_of_a_pass(body, launches):
    """What the README beside the engine says: they decide what a short sequence costs."""
    if body.route.path != "triton":
        pytest.skip("the kernels' passes")
    config = LoraConfig(r=4, target_modules=["layers.0", "layers.1", "layers.3"], use_dora=True, use_dora_triton=True)
    model = get_peft_model(Net(), config).to(body.device)
    net_of(model).order = [0, 1, 3]
    x = x_of(model)
    model(x).sum().backward()
    launches.clear()
    with Products() as forward:
        y = model(x).sum()
    # for all layers: the cast with its digests, and the norms; then a pass over each layer's output
    assert sorted(launches) == ["cast_fwd_kernel"] + ["compose_fwd_kernel"] * 3 + ["norms_fwd_kernel"]
    assert forward.count == 2 * 3
    launches.clear()
    with Products() as backward:
        y.backward()
    assert launches == ["compose_bwd_kernel"] * 3
    assert backward.count == 4 * 3  # dh, dA, and dx in two; dB comes out of the pass over dy


def test_launches_of_a_decode_step(body, launches):
    """Without a gradient a layer is one launch, its own product included, and the whole model has two more."""
    if body.route.path != "triton":
        pytest.skip("the kernels' passes")
    config = LoraConfig(r=4, target_modules=["layers.0", "layers.1", "layers.3"], use_dora=True, use_dora_triton=True)
    model = get_peft_model(Net(), config).to(body.device).eval()
    net_of(model).order = [0, 1, 3]
    x = x_of(model, rows=1).detach()
    with torch.inference_mode():
        model(x)
        launches.clear()
        with Products() as products:
            model(x)
    assert sorted(launches) == ["cast_fwd_kernel", "norms_fwd_kernel"] + ["small_batch_fwd_kernel"] * 3
    assert products.count == 0
