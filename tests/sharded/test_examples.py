# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The examples for several GPUs, as they stand, on two CPU ranks through gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


def launch(config: str, script: str, output: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / config)]
    command += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0", str(EXAMPLES / script)]
    command += ["--smoke", "--output", str(output)]
    done = subprocess.run(command, env=environment, cwd=output.parent, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_qdora_under_fsdp_on_two_ranks(tmp_path):
    pytest.importorskip("bitsandbytes")
    printed = launch("fsdp_qdora/fsdp_cpu.yaml", "fsdp_qdora/train.py", tmp_path / "adapter")
    assert "on one process, reloaded" in printed
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))["use_dora"] is True


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_dora_under_deepspeed_on_two_ranks(stage, tmp_path):
    printed = launch(f"deepspeed_dora/zero{stage}_cpu.yaml", "deepspeed_dora/train.py", tmp_path / "adapter")
    assert "on one process, reloaded" in printed


@pytest.mark.parametrize("config", sorted(EXAMPLES.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_configs_are_accelerates(config):
    """Every key is one that `accelerate launch` reads, and the CPU's config differs from the GPU's where it must."""
    from accelerate.commands.config.config_args import ClusterConfig

    read = yaml.safe_load(config.read_text("utf-8"))
    assert ClusterConfig.from_yaml_file(config).num_processes == 2
    cpu = config.stem.endswith("_cpu")
    assert read["use_cpu"] is cpu
    if cpu:
        gpu = yaml.safe_load((config.parent / f"{config.stem.removesuffix('_cpu')}.yaml").read_text("utf-8"))
        assert gpu.keys() == read.keys() and gpu["distributed_type"] == read["distributed_type"]
