# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The examples for other people's loops, run as they stand with `--smoke`."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.filterwarnings("ignore")


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    script = EXAMPLES / name / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [script.name, "--output", str(folder), *arguments])
    runpy.run_path(str(script), run_name="__main__")


def test_supervised_fine_tuning(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl", reason="needs trl")
    run("sft_trl", tmp_path / "adapter", monkeypatch, "--smoke")
    printed = capsys.readouterr().out
    assert "logits 0e+00 apart" in printed and "3 plus 4 -> " in printed
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))["use_dora"]


def test_a_diffusion_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers", reason="needs diffusers")
    run("diffusion_dora", tmp_path / "adapter", monkeypatch, "--smoke")
    printed = capsys.readouterr().out
    assert "pictures 0 of 255 apart" in printed and "fused at weight 0.8" in printed
    assert (tmp_path / "adapter" / "picture.png").is_file()


def test_pictures_of_ones_own_are_cut_to_squares(tmp_path):
    pytest.importorskip("diffusers", reason="needs diffusers")
    from PIL import Image

    load = runpy.run_path(str(EXAMPLES / "diffusion_dora" / "diffusion_dora.py"))["load_pictures"]
    with pytest.raises(FileNotFoundError, match="holds no"):
        load(tmp_path, 16)
    picture = Image.new("RGB", (60, 20), (0, 0, 0))
    picture.paste((255, 0, 0), (20, 0, 40, 20))
    picture.save(tmp_path / "wide.png")
    loaded = load(tmp_path, 16)
    assert loaded.shape == (1, 3, 16, 16)
    assert bool((loaded[0, 0] == 1).all()) and bool((loaded[0, 1:] == -1).all())


@pytest.mark.parametrize("name", ["sft_trl", "diffusion_dora"])
def test_half_of_what_is_needed_is_refused(tmp_path, monkeypatch, capsys, name):
    pytest.importorskip({"sft_trl": "trl", "diffusion_dora": "diffusers"}[name])
    with pytest.raises(SystemExit):
        run(name, tmp_path, monkeypatch, "--model", "somewhere")
    assert "give either --smoke, or both" in capsys.readouterr().err
