# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""CUDA graphs: a captured training step trains as an eager one, a captured decode step sees every new value, and what did
not change is not computed again."""

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from peft import LoraConfig, dora, get_peft_model

pytestmark = pytest.mark.gpu
WIDTH = 256
BASES = ["bf16", "nf4"]


class Net(nn.Module):
    """Four layers of which each can be run again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=i == 2) for i in range(4)])
        self.checkpointing = False

    def forward(self, x):
        for layer in self.layers:
            if self.checkpointing:
                x = checkpoint(self.one, layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.one(layer, x)
        return x

    @staticmethod
    def one(layer, x):
        return x + torch.tanh(layer(x))


def make_model(base, **options):
    torch.manual_seed(0)
    net = Net()
    if base == "nf4":
        bnb = pytest.importorskip("bitsandbytes")
        for i, layer in enumerate(net.layers):
            packed = bnb.nn.Linear4bit(
                WIDTH, WIDTH, bias=layer.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(
                layer.weight.data.bfloat16(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            if layer.bias is not None:
                packed.bias = layer.bias
            net.layers[i] = packed
    net = net.to("cuda") if base == "nf4" else net.to(device="cuda", dtype=torch.bfloat16)
    config = LoraConfig(
        r=8, lora_alpha=16, use_dora=True, use_dora_triton=True, init_lora_weights=False,
        target_modules=[f"layers.{i}" for i in range(4)], **options,
    )  # fmt: skip
    return get_peft_model(net, config)


def capture(function, warm=3):
    """A function that replays `function`, and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def make_step(model, x, accumulation=1):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, capturable=True)

    def step():
        total = 0.0
        for i in range(accumulation):
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = model(x[i]).float().square().mean() / accumulation
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_captured_training_is_eager_training(base, checkpointing, accumulation):
    model = make_model(base)
    model.base_model.model.checkpointing = checkpointing
    twin = copy.deepcopy(model)
    x = torch.randn(accumulation, 40, WIDTH, device="cuda", dtype=torch.bfloat16)
    eager = make_step(twin, x, accumulation)
    replay, result = capture(make_step(model, x, accumulation))
    expected = [eager().item() for _ in range(3 + 6)][3:]
    found = []
    for _ in range(6):
        replay()
        found.append(result.item())
    assert found[0] > found[-1]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-2, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):  # and an eager pass goes on from there
        torch.testing.assert_close(model(x[0]), copy.deepcopy(model)(x[0]))


def make_decode(model, x):
    def decode():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return model(x)

    return decode


def write_everywhere(model, factor):
    for name, p in model.named_parameters():
        if p.requires_grad and ("lora_B" in name or "magnitude" in name):
            p.data.mul_(factor)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_captured_decoding_sees_every_write(base, rows):
    model = make_model(base).eval()
    x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
    decode = make_decode(model, x)
    replay, y = capture(decode)
    for factor in (1.0, 1.5, 1.0, 0.5):
        write_everywhere(model, factor)
        x.normal_()
        replay()
        found = y.clone()
        torch.testing.assert_close(found, make_decode(copy.deepcopy(model), x)(), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(found, decode(), rtol=1e-2, atol=1e-2)
        replay()
        assert torch.equal(y, found)


def test_two_graphs_of_one_model():
    """As for two batch sizes; each replay follows the last write, whichever ran before it."""
    model = make_model("bf16").eval()
    inputs = [torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16) for rows in (1, 8)]
    decodes = [make_decode(model, x) for x in inputs]
    graphs = [capture(decode) for decode in decodes]
    for i in (0, 1, 1, 0, 0, 1):
        write_everywhere(model, 1.1)
        replay, y = graphs[i]
        replay()
        torch.testing.assert_close(y, decodes[i](), rtol=1e-2, atol=1e-2)
    del graphs[0], replay, y
    replay, y = graphs[0]
    write_everywhere(model, 0.5)
    replay()
    torch.testing.assert_close(y, decodes[1](), rtol=1e-2, atol=1e-2)


def test_a_graph_outlives_its_layers():
    """What the launches read is kept when the model's own bookkeeping is made anew."""
    model = make_model("bf16").eval()
    x = torch.randn(1, WIDTH, device="cuda", dtype=torch.bfloat16)
    replay, y = capture(make_decode(model, x))
    replay()
    before = y.clone()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    make_decode(model, x)()
    filler = [torch.full((1 << 14,), -1, dtype=torch.int64, device="cuda") for _ in range(50)]
    replay()
    assert torch.equal(y, before)
    del filler


def test_one_pass_before_the_capture_is_enough():
    model = make_model("bf16").eval()
    x = torch.randn(1, WIDTH, device="cuda", dtype=torch.bfloat16)
    decode = make_decode(model, x)
    replay, y = capture(decode, warm=1)
    for _ in range(2):
        write_everywhere(model, 1.5)
        replay()
        torch.testing.assert_close(y, make_decode(copy.deepcopy(model), x)(), rtol=1e-2, atol=1e-2)


def norm_microseconds(function):
    """How long the norms' kernels run in `function`."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    return sum(event.time_range.elapsed_us() for event in profiled.events() if event.name == "norms_fwd_kernel")


def test_a_replay_without_changes_does_not_read_the_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4096, 8192, bias=False)).to("cuda", torch.bfloat16)
    config = LoraConfig(r=16, use_dora=True, use_dora_triton=True, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(net, config).eval()
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    replay, _ = capture(make_decode(model, x))
    replay()
    same = norm_microseconds(replay)
    write_everywhere(model, 1.5)
    changed = norm_microseconds(replay)
    assert 0 < 3 * same < changed
    assert norm_microseconds(replay) < changed / 2
    dora.invalidate(model)
    assert norm_microseconds(replay) > 2 * same
