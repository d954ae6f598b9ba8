# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The main job: the example end to end, small here, and as `make finetune` runs it among the slow tests."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "dora_finetuning"
# The widths are multiples of NF4's block of 64.
SMALL = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "steps": 2}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def example(monkeypatch, tmp_path):
    """The example's modules that tests change, with a recipe for a base of a few thousand parameters and a cache folder of its own."""
    for name in ("datasets", "tokenizers", "bitsandbytes"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("make_base", "dora_finetuning", "texts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    make_base = importlib.import_module("make_base")
    make_base.RECIPE.update(SMALL, num_attention_heads=2, num_key_value_heads=2, characters=900_000)
    yield make_base, importlib.import_module("dora_finetuning")
    for name in ("make_base", "dora_finetuning", "texts"):
        sys.modules.pop(name, None)


def run(module, monkeypatch, *arguments: str) -> None:
    shape = ["--steps", "2", "--rank", "2", "--seq-len", "32", "--batch-size", "2", "--held-out-rows", "4"]
    monkeypatch.setattr(sys, "argv", ["dora_finetuning.py", *shape, *arguments])
    module.main()


def test_it_runs_on_a_text_of_ones_own(example, monkeypatch, tmp_path, capsys):
    make_base, module = example
    text = tmp_path / "own.jsonl"
    lines = [json.dumps({"text": f"line {i}: " + "the quick brown fox " * 20}) for i in range(60)]
    text.write_text("\n".join(lines), encoding="utf-8")
    for quant, adapter in (("nf4", []), ("int8", []), ("none", ["--no-dora"])):
        output = tmp_path / f"adapter-{quant}"
        run(module, monkeypatch, "--data", str(text), "--quant", quant, "--output", str(output), *adapter)
        printed = capsys.readouterr().out
        for what in ("trainable params", "perplexity", "a second; peak memory", "sample after", "reloaded", "merged"):
            assert what in printed, f"{quant}: {what} is not printed"
        config = json.loads((output / "adapter_config.json").read_text("utf-8"))
        assert config["use_dora"] is (quant != "none")
        assert config.get("use_dora_triton", False) is (quant != "none")
    assert make_base.find_base() == make_base.base_folder()
    assert [path.name for path in make_base.cache_folder().iterdir()] == [make_base.base_folder().name]


def test_a_base_that_fails_to_be_made_leaves_nothing(example, monkeypatch):
    make_base, _ = example

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_base, "train_model", fail)
    with pytest.raises(KeyboardInterrupt):
        make_base.find_base()
    assert not list(make_base.cache_folder().iterdir())


def test_the_headers_are_split_by_file_the_same_each_time(example):
    _, module = example
    first, second = module.cpp_headers(), module.cpp_headers()
    assert first == second
    assert 0.05 < len(first["held_out"]) / len(first["train"]) < 0.25


def test_a_data_file_without_text_is_refused(example, tmp_path):
    _, module = example
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"words": "a"}\n' * 40, encoding="utf-8")
    with pytest.raises(ValueError, match="none named `text`"):
        module.load_texts(str(path), seed=0)


def test_logits_that_differ_are_noticed(example):
    import torch

    _, module = example
    with pytest.raises(AssertionError, match="more than"):
        module.assert_equal_logits("reloaded", torch.ones(2, 3), torch.ones(2, 3) * 1.001, 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_main_job(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    command = [sys.executable, str(FOLDER / "dora_finetuning.py"), "--output", str(tmp_path / "adapter")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held-out perplexity fell by" in done.stdout
    assert "merged into the dequantised base" in done.stdout
    print(f"the main job took {time.perf_counter() - start:.0f} s")
