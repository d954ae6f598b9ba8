# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Every kernel compiles for NVIDIA's and AMD's GPUs, which needs neither of them: no instruction of one maker is in it."""

import importlib

import pytest

from peft.dora.route import interpreting, triton_is_installed

if not triton_is_installed():
    pytest.skip("triton is not installed", allow_module_level=True)
if interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "Ampere": GPUTarget("cuda", 80, 32),
    "Hopper": GPUTarget("cuda", 90, 32),
    "MI300": GPUTarget("hip", "gfx942", 64),
}
BF16, FP32 = "*bf16", "*fp32"
NUMBERS = {"tokens": "i32", "steps": "i32", "scaling": "fp32", "out_features": "i32"}
TABLE = {"table_ptr": "*i64", "digest_ptr": "*i64", "owners": "i32", "slot": "i32", "members": "i32", "floor": "fp32"}
NORM = {
    "FACTOR_TYPE": tl.bfloat16, "SCALE_TYPE": tl.float32, "ZERO_TYPE": tl.float32, "GROUP_TYPE": None,
    "MAGNITUDE_TYPE": tl.float32, "LAYOUT": 0, "EVEN_IN": True, "BLOCKSIZE": 0, "NESTED": 0, "EVEN": False, "BITS": 0,
    "COUNT": 0, "ROUND": 1, "RANK": 12, "BLOCK_M": 32, "BLOCK_K": 128, "BLOCK_R": 16,
}  # fmt: skip
COMPOSE = {"RANK": 12, "BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_R": 16}


def norm_of(weight, pointers=BF16, **constants):
    types = TABLE | {"copy_ptr": pointers, "old_ptr": FP32, "stats_ptr": FP32}
    return "refresh", "norms_fwd_kernel", types, NORM | {"WEIGHT_TYPE": weight} | constants


def backward_of(pointer, split=True):
    types = NUMBERS | {"ready_ptr": "*i32"}
    types |= dict.fromkeys(("dy_ptr", "kept_ptr", "h_ptr", "t_ptr"), pointer)
    types |= dict.fromkeys(("stats_ptr", "dm_ptr", "db_ptr", "partial_ptr"), FP32)
    alone = {} if split else {"partial_ptr": None, "ready_ptr": None}
    return "compose", "compose_bwd_kernel", types, COMPOSE | {"KEPT_IS_V": False, "SPLIT": split} | alone


def forward_of(pointer):
    types = NUMBERS | dict.fromkeys(("u_ptr", "y_ptr", "h_ptr", "b_ptr"), pointer)
    types |= dict.fromkeys(("stats_ptr", "bias_ptr", "lora_bias_ptr"), FP32)
    return "compose", "compose_fwd_kernel", types, COMPOSE | {"KEEP_V": True}


UNPACK4 = {
    "data_ptr": "*u8", "absmax_ptr": "*u8", "code_ptr": FP32, "outer_ptr": FP32, "outer_code_ptr": FP32,
    "offset_ptr": FP32, "w_ptr": BF16, "first": "i32", "elements": "i32",
}  # fmt: skip
KERNELS = {
    "cast": ("refresh", "cast_fwd_kernel", TABLE | {"copy_ptr": BF16}, {"SOURCE": tl.float32, "BLOCK": 4096}),
    "norm of a plain weight": norm_of(tl.bfloat16, FORMAT=0),
    "norm of 4 bits": norm_of(
        tl.uint8, FORMAT=4, SCALE_TYPE=tl.uint8, LAYOUT=2, BLOCKSIZE=64, NESTED=256, EVEN=True
    ),
    "norm of 8 bits": norm_of(tl.int8, FORMAT=8, LAYOUT=2),
    "compose, bf16": forward_of(BF16),
    "compose, fp32": forward_of(FP32),
    "gradient, bf16": backward_of(BF16),
    "gradient, fp32": backward_of(FP32),
    "gradient in one part": backward_of(BF16, split=False),
    "dequantise 4 bits": (
        "packed4", "dequantise4_kernel", UNPACK4, {"BLOCKSIZE": 64, "NESTED": 256, "ROUND": 0, "BLOCK": 1024}
    ),
    "dequantise 8 bits": (
        "packed8", "dequantise8_kernel",
        {"data_ptr": "*i8", "scb_ptr": FP32, "w_ptr": BF16, "out_features": "i32", "in_features": "i32"},
        {"BLOCK_M": 8, "BLOCK_K": 512},
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name, target):
    wanted = TARGETS[target]
    if {"cuda": "nvidia", "hip": "amd"}[wanted.backend] not in backends:
        pytest.skip(f"this triton has no backend for {wanted.backend}")
    module, kernel, types, constants = KERNELS[name]
    function = getattr(importlib.import_module(f"peft.dora.kernels.{module}"), kernel)
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in function.arg_names}
    places = {(function.arg_names.index(arg),): value for arg, value in constants.items()}
    compiled = triton.compile(ASTSource(function, signature, places), target=wanted, options={"num_warps": 4})
    assert compiled.asm
    # an older card's shared memory, where a program may have 99 KiB of it
    assert compiled.metadata.shared <= 99 * 1024
