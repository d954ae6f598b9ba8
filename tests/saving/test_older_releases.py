# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Adapters that upstream's releases 0.4.0 to 0.21.0 wrote, and the outputs that they had there.

`older_releases.json` holds, by release and adapter, the names of the tensors in the file and the config (that of `lora`
whole, of the others what differs from it). The values and the outputs stand apart; they are the same in all releases, but
for factors of stacked experts, which 0.17 to 0.19.0 stored the other way round (`experts-turned`).
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

WRITTEN = json.loads(Path(__file__).with_name("older_releases.json").read_text("utf-8"))
ADAPTERS = [(release, name) for release, held in WRITTEN["releases"].items() for name in held["adapters"]]
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.conv, self.lin = nn.Embedding(12, 8), nn.Conv2d(1, 2, 3, padding=1), nn.Linear(16, 8)
        self.out, self.head = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.emb(ids)[:, None]).permute(0, 2, 1, 3).flatten(2)
        return self.head(self.out(torch.tanh(self.lin(x))))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 3, 5)), nn.Parameter(torch.randn(2, 5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eth,eoh->to", torch.tanh(torch.einsum("ti,ehi->eth", x, self.up)), self.down)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


def base_of(name: str) -> tuple[type[nn.Module], torch.Tensor, LoraConfig]:
    """The class of an adapter's base model, an input, and the config of an adapter beside it."""
    if name == "experts":
        x = torch.linspace(-1, 1, 10).reshape(2, 5)
        return Mixture, x, LoraConfig(r=1, target_modules=[], target_parameters=["experts.up"])
    return Net, IDS, LoraConfig(r=2, target_modules=["lin"])


def config_of(release: str, name: str) -> dict:
    adapters = WRITTEN["releases"][release]["adapters"]
    return {**adapters["lora"]["config"], **adapters[name]["config"]}


def value_of(values: dict, key: str) -> torch.Tensor:
    """The value of a tensor, whose name in a file is older or newer."""
    key = key.removeprefix("base_model.model.").replace("magnitude_vector.weight", "magnitude_vector")
    return torch.tensor(values[key.replace(".base_layer.bias", ".bias")])


def write(folder: Path, release: str, name: str) -> None:
    held = WRITTEN["releases"][release]
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config_of(release, name)))
    adapter = held["adapters"][name]
    values = WRITTEN["tensors"][adapter.get("tensors", name)]
    tensors = {key: value_of(values, key) for key in adapter["keys"]}
    if held["file"].endswith(".bin"):
        torch.save(tensors, folder / held["file"])
    else:
        save_file(tensors, folder / held["file"], metadata={"format": "pt"})


@pytest.mark.parametrize(("release", "name"), ADAPTERS)
def test_the_output_is_what_it_was(tmp_path, release, name):
    write(tmp_path / "adapter", release, name)
    base, x, other = base_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="lora_bias|save_embedding_layers")
        model = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    expected = torch.tensor(WRITTEN["outputs"][name])
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base()(x), expected, atol=1e-2)
    again = get_peft_model(base(), other, "other")
    again.load_adapter(tmp_path / "adapter", "mine")
    again.set_adapter("mine")
    torch.testing.assert_close(again.eval()(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("release", "name"), [pair for pair in ADAPTERS if pair[0] in ("0.4.0", "0.9.0", "0.18.0")])
def test_saved_anew_it_has_todays_names(tmp_path, release, name):
    write(tmp_path / "old", release, name)
    base, x, _ = base_of(name)
    model = PeftModel.from_pretrained(base(), tmp_path / "old")
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert not any("magnitude_vector.weight" in key for key in state)
    if name == "bias":
        assert {f"base_model.model.{layer}.base_layer.bias" for layer in ("lin", "out")} <= state.keys()
    model.save_pretrained(tmp_path / "new", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "new").eval()
    torch.testing.assert_close(loaded(x), model.eval()(x))


def test_every_release_is_there():
    minor = {int(release.split(".")[1]) for release in WRITTEN["releases"]}
    assert minor == set(range(4, 22))
