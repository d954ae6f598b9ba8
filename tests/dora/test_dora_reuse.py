# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The norm is reused exactly: whatever writes to A, B, W or the scaling, and however, is seen at the next pass."""

import copy
import pickle
import threading

import pytest
import torch
from dora_truth import make_case, ours, run

from peft import dora
from peft.dora.eager import DenseWeight


class Layer:
    """A layer with a cache that counts how often its norm was computed."""

    def __init__(self, body, dtype=None, **sizes):
        self.body, self.dtype = body, dtype or torch.float32
        self.case = make_case(in_features=24, out_features=40, rank=4, device=body.device, **sizes)
        self.weight = self.case.weight()
        self.scaling = 0.5
        self.cache = dora.NormCache()

    @property
    def A(self):
        return self.case.tensors["A"]

    @property
    def B(self):
        return self.case.tensors["B"]

    def factors(self):
        triton = self.body.route.path == "triton"
        return self.cache.factors(self.weight, self.A, self.B, self.scaling, self.dtype, triton=triton)

    def norm(self):
        return self.factors().stats[0]

    def expected(self):
        A, B = self.A.detach().to(self.dtype), self.B.detach().to(self.dtype)
        return dora.row_norm(self.weight, A, B, self.scaling, route=self.body.route)

    def check(self):
        assert torch.equal(self.norm(), self.expected())


@pytest.fixture
def layer(body):
    made = Layer(body)
    made.check()
    return made


def counting(layer, monkeypatch):
    """Count the norms that are computed: a row of W is then NaN, which only a computed norm shows."""
    layer.weight.matrix.detach()[0, 0] = float("nan")
    layer.weight.key = lambda: "the same"


def was_computed(layer):
    return bool(layer.norm()[0].isnan())


def test_nothing_is_computed_while_nothing_changes(layer, monkeypatch):
    if layer.body.name == "torch_gpu":
        pytest.skip("computes at every pass that records a gradient")
    layer.weight.key = lambda: "the same"
    layer.check()
    counting(layer, monkeypatch)
    assert not was_computed(layer)
    with torch.no_grad():
        assert not was_computed(layer)
        layer.B[3, 1] += 1e-3
    assert was_computed(layer)
    clean = layer.norm()
    layer.weight.matrix.detach()[0, 0] = 0.0
    assert torch.equal(layer.norm()[1:], clean[1:]) and layer.norm()[0].isnan()  # reused again, as it was


def optimizers():
    def of_torch(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2, fused=True)

    def of_bitsandbytes(parameters):
        bnb = pytest.importorskip("bitsandbytes")
        return bnb.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=16)

    return {"fused AdamW": of_torch, "bitsandbytes AdamW8bit": of_bitsandbytes}


@pytest.mark.parametrize("name", optimizers())
def test_optimizers_that_leave_no_trace(layer, name):
    optimizer = optimizers()[name]([layer.A, layer.B])
    for step in range(3):
        layer.A.grad, layer.B.grad = torch.randn_like(layer.A), torch.randn_like(layer.B)
        before = layer.norm().clone()
        try:
            optimizer.step()
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            pytest.skip(f"{name} does not run on {layer.body.device}: {error}")
        layer.check()
        assert not torch.equal(layer.norm(), before), step


WRITES = {
    "data": lambda layer: layer.A.data.mul_(1.01),
    "data of one element": lambda layer: layer.B.data.view(-1)[-1:].add_(1.0),
    "raw memory": lambda layer: layer.A.detach().view(-1)[:1].fill_(3.0),
    "copy_": lambda layer: layer.B.detach().copy_(torch.randn_like(layer.B)),
    "load_state_dict": lambda layer: load(layer),
    "another tensor": lambda layer: layer.case.tensors.update(A=torch.randn_like(layer.A)),
    "another rank": lambda layer: rank(layer, 7),
    "a smaller rank": lambda layer: rank(layer, 1),
    "scaling": lambda layer: setattr(layer, "scaling", 0.75),
    "scaling of zero": lambda layer: setattr(layer, "scaling", 0.0),
    "weight in place": lambda layer: layer.weight.matrix.mul_(2.0),
    "another weight": lambda layer: setattr(layer, "weight", DenseWeight(torch.randn_like(layer.case.W))),
    "dtype": lambda layer: setattr(layer, "dtype", torch.float16),
    "nothing": lambda layer: None,
}


def load(layer):
    module = torch.nn.Module()
    module.A, module.B = torch.nn.Parameter(layer.A), torch.nn.Parameter(layer.B)
    layer.case.tensors.update(A=module.A, B=module.B)
    layer.check()
    module.load_state_dict({"A": torch.randn_like(layer.A), "B": torch.randn_like(layer.B)})


def rank(layer, r):
    device = layer.body.device
    layer.case.tensors.update(A=torch.randn(r, 24, device=device), B=torch.randn(40, r, device=device))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("grad", [False, True])
def test_writes_are_seen(layer, write, grad):
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            with torch.no_grad():
                WRITES[write](layer)
            layer.check()
            layer.check()


def test_sequences_of_reads_and_writes(layer):
    """Back to old values, changes between equal passes, NaN: the answer is always that of the values now."""
    generator = torch.Generator().manual_seed(0)
    saved = [(layer.A.detach().clone(), layer.B.detach().clone()) for _ in range(2)]
    saved[1][0].mul_(2.0)
    for choice in torch.randint(0, 4, (24,), generator=generator).tolist():
        if choice < 2:
            layer.A.data.copy_(saved[choice][0])
        elif choice == 2:
            layer.B.data.add_(0.25)
        layer.check()
    layer.A.data[0, 0] = float("nan")
    assert layer.norm().isnan().any() and layer.norm().isnan().any()
    layer.A.data[0, 0] = 0.0
    layer.check()


def test_invalidate(layer):
    layer.weight.key = lambda: "the same"
    layer.check()
    layer.weight.matrix.mul_(3.0)

    class Holder(torch.nn.Module):
        def dora_caches(self):
            return [layer.cache]

    dora.invalidate(torch.nn.Sequential(Holder(), torch.nn.Identity()))
    layer.check()


def test_adapters_have_caches_of_their_own(body):
    one, two = Layer(body), Layer(body, seed=1)
    for layer in (one, two, one, two):
        layer.check()


def test_tensors_of_one_pass_outlive_the_next(body):
    layer = Layer(body, torch.float16)
    first = layer.factors()
    kept = [tensor.clone() for tensor in first[:3]]
    layer.A.data.mul_(2.0)
    layer.B.data.mul_(2.0)
    layer.check()
    if layer.body.name != "torch_gpu":
        for tensor, copied in zip(first[:3], kept, strict=True):
            assert torch.equal(tensor, copied)


def test_copies_and_pickles_are_empty(layer):
    for copied in (copy.deepcopy(layer.cache), copy.copy(layer.cache), pickle.loads(pickle.dumps(layer.cache))):
        assert isinstance(copied, dora.NormCache) and copied.state is copied.batch is None
        layer.cache = copied
        layer.check()


def test_threads(layer):
    failures = []

    def work():
        failures.extend(i for i in range(20) if not torch.equal(layer.norm(), expected))

    expected = layer.expected()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_inference_mode_then_training(layer):
    with torch.inference_mode():
        layer.A.data.mul_(2.0)
        layer.check()
    norm = layer.norm()
    x = torch.ones(3, 40, device=layer.body.device, requires_grad=True)
    (x * norm.to(x.device)).sum().backward()  # saves the norm, which autograd refuses for an inference tensor
    layer.check()


def test_gradient_accumulation_with_a_step_between(body):
    """Two passes, a step through raw pointers, two passes: each gradient is that of a fresh layer with the same values."""
    case = make_case(in_features=24, out_features=40, rank=4, device=body.device)
    case.cache = dora.NormCache()
    for _ in range(3):
        for _ in range(2):
            found = run(case, ours(body.route))
            fresh = run(copy.copy(case), lambda case: ours(body.route)(uncached(case)))
            for name, tensor in found.items():
                assert torch.equal(tensor, fresh[name]), name
        for name in ("A", "B", "magnitude"):
            case.tensors[name].data.add_(0.01)


def uncached(case):
    case.cache = None
    return case


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_replay_sees_new_values():
    from dora_truth import BODIES

    layer = Layer(BODIES["triton"])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer.check()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    before = (layer.A.detach().clone(), layer.norm().clone())
    with torch.cuda.graph(graph):
        norm = layer.norm()
    for factor in (1.0, 2.0, 0.5, 1.0):
        layer.A.data.mul_(factor)
        graph.replay()
        assert torch.equal(norm, layer.expected())
    layer.A.data.copy_(before[0])
    graph.replay()
    assert torch.equal(norm, before[1])
    layer.check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_another_stream_starts_afresh():
    from dora_truth import BODIES

    layer = Layer(BODIES["triton"])
    layer.check()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer.A.data.mul_(2.0)
        layer.check()
    torch.cuda.current_stream().wait_stream(stream)
    layer.check()


@pytest.fixture
def captured(layer, monkeypatch):
    """A function that makes `layer`'s norm as the replay of a captured pass does, here without a graph."""
    if layer.body.route.path != "triton":
        pytest.skip("for kernels")
    from peft.dora.kernels import refresh

    def replay():
        with monkeypatch.context() as patch:
            patch.setattr(refresh, "_stream", lambda device: (True, None))
            return layer.norm()

    return replay


def test_captured_passes_reuse_their_own_norm(layer, captured):
    layer.weight.key = lambda: "the same"
    kept, row = layer.norm().clone(), layer.weight.matrix.detach()[0].clone()
    assert torch.equal(captured(), kept)
    layer.weight.matrix.detach()[0] = float("nan")  # a norm that is computed now shows it
    assert torch.equal(captured(), kept) and torch.equal(layer.norm(), kept)
    layer.B.data[1, 1] += 1.0
    assert captured()[0].isnan()
    layer.weight.matrix.detach()[0] = row
    layer.B.data[1, 1] -= 1.0
    assert torch.equal(captured(), layer.expected())


def test_captured_and_eager_passes_in_turn(layer, captured):
    for step in range(7):
        layer.A.data.view(-1)[step] += 0.5
        for call in [(captured, layer.norm), (layer.norm, captured), (captured, captured)][step % 3]:
            assert torch.equal(call(), layer.expected())
    layer.A.data.neg_()
    assert torch.equal(captured(), layer.expected())


def test_captured_norms_expire(layer, captured):
    captured()
    layer.weight.matrix.detach().mul_(2.0)  # as a raw pointer would: no captured pass can see it
    dora.invalidate(torch.nn.Identity())
    assert torch.equal(captured(), layer.expected())
    captured()
    layer.weight.matrix.mul_(2.0)
    layer.check()  # an eager pass sees that, and tells
    assert torch.equal(captured(), layer.expected())


def test_a_table_made_under_capture_serves_no_other_pass(body, captured, monkeypatch):
    """It exists in the graph's replays alone."""
    fresh = Layer(body)
    from peft.dora.kernels import refresh

    with monkeypatch.context() as patch:
        patch.setattr(refresh, "_stream", lambda device: (True, None))
        fresh.check()
        batch = fresh.cache.batch
    assert batch.places is None and batch.captured is None
    batch.table.zero_()
    fresh.check()


def test_owners_in_a_table_made_under_capture(body):
    if body.route.path != "triton":
        pytest.skip("for kernels")
    from peft.dora.kernels.captured import tabulate

    entries, owners = [2**40 + 3, 0, 7], [0, 0, 1, 1, 1, 2, 0, 1]
    assert tabulate(entries, owners, torch.device(body.device)).tolist() == entries + owners
