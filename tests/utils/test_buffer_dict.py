# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A dict of buffers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft.tuners._buffer_dict import BufferDict


def test_is_a_dict():
    buffers = BufferDict({"a": torch.zeros(2), "b": torch.ones(1)})
    assert list(buffers) == list(buffers.keys()) == ["a", "b"]
    assert len(buffers) == 2
    assert "a" in buffers
    assert torch.equal(buffers["b"], torch.ones(1))
    assert [key for key, _ in buffers.items()] == ["a", "b"]
    assert [len(value) for value in buffers.values()] == [2, 1]
    assert torch.equal(buffers.pop("a"), torch.zeros(2))
    buffers.update([("c", torch.zeros(3))])
    buffers.update(BufferDict({"d": torch.zeros(4)}))
    assert list(buffers) == ["b", "c", "d"]
    del buffers["c"]
    with pytest.raises(KeyError):
        buffers["c"]
    assert "(b): torch.float32 [1] on cpu" in repr(buffers)
    buffers.clear()
    assert len(buffers) == 0


@pytest.mark.parametrize("persistent", [True, False])
def test_state_dict_and_moving(persistent):
    module = nn.Module()
    module.buffers_by_name = BufferDict({"a": torch.zeros(2)}, persistent=persistent)
    assert ("buffers_by_name.a" in module.state_dict()) is persistent
    module.to(torch.float64)
    assert module.buffers_by_name["a"].dtype == torch.float64
    assert not list(module.parameters())
    del module.buffers_by_name["a"]
    module.buffers_by_name["a"] = torch.ones(2)
    assert ("buffers_by_name.a" in copy.deepcopy(module).state_dict()) is persistent


def test_refusals():
    with pytest.raises(TypeError, match="'a' must be a tensor, got int"):
        BufferDict({"a": 3})
    with pytest.raises(TypeError, match="mapping or pairs"):
        BufferDict().update(3)
