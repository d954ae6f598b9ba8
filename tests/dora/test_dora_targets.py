# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Every kernel compiles for NVIDIA's and AMD's GPUs, which needs neither of them: no instruction of one maker is in it."""

import importlib
import pkgutil

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

from peft.dora.kernels.tiles import norm_tiles
from peft.dora.kernels.whole import whole_tiles

TARGETS = {
    "Ampere": GPUTarget("cuda", 80, 32),
    "Hopper": GPUTarget("cuda", 90, 32),
    "MI300": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"Ampere": 99, "Hopper": 227, "MI300": 64}  # KiB that a program may have; 99 on the smaller cards of its time
BF16, FP32 = "*bf16", "*fp32"
NUMBERS = {"tokens": "i32", "steps": "i32", "scaling": "fp32", "out_features": "i32"}
TABLE = {"table_ptr": "*i64", "digest_ptr": "*i64", "owners": "i32", "slot": "i32", "members": "i32", "floor": "fp32"}
NORM = {
    "FACTOR_TYPE": tl.bfloat16, "SCALE_TYPE": tl.float32, "ZERO_TYPE": tl.float32, "GROUP_TYPE": None,
    "MAGNITUDE_TYPE": tl.float32, "LAYOUT": 0, "EVEN_IN": True, "ALIGNED": True, "BLOCKSIZE": 0,
    "NESTED": 0, "ROWS": 0, "BITS": 0,
    "COUNT": 0, "ROUND": 1, "RANK": 12, "BLOCK_M": 32, "BLOCK_K": 128, "BLOCK_R": 16,
    "STAGES": None,
}  # fmt: skip
COMPOSE = {"RANK": 12, "BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_R": 16}


def norm_of(weight, pointers=BF16, **constants):
    types = TABLE | {"copy_ptr": pointers, "kept_ptr": FP32, "stats_ptr": FP32}
    return "refresh", "norms_fwd_kernel", types, NORM | {"WEIGHT_TYPE": weight} | constants


def norm_constants(rank, itemsize, wide):
    tiles = norm_tiles(rank, 0, itemsize, wide)
    sizes = {"BLOCK_M": tiles.block_m, "BLOCK_K": tiles.block_k, "BLOCK_R": tiles.block_r}
    return sizes | {"RANK": rank, "STAGES": tiles.stages, "num_warps": tiles.warps}


def backward_of(pointer, split=True):
    types = NUMBERS | {"ready_ptr": "*i32"}
    types |= dict.fromkeys(("dy_ptr", "kept_ptr", "h_ptr", "t_ptr"), pointer)
    types |= dict.fromkeys(("stats_ptr", "dm_ptr", "db_ptr", "partial_ptr"), FP32)
    alone = {} if split else {"partial_ptr": None, "ready_ptr": None}
    return "compose", "compose_bwd_kernel", types, COMPOSE | {"KEPT_IS_V": False, "SPLIT": split, "STAGES": 3} | alone


def forward_of(pointer, **constants):
    types = NUMBERS | dict.fromkeys(("u_ptr", "y_ptr", "h_ptr", "b_ptr"), pointer)
    types |= dict.fromkeys(("stats_ptr", "bias_ptr", "lora_bias_ptr"), FP32)
    return "compose", "compose_fwd_kernel", types, COMPOSE | {"KEEP_V": True} | constants


def small_batch_of(pointer, block_m, packed=False, fold=True):
    names = "x_ptr", "w_ptr", "a_ptr", "h_ptr", "b_ptr", "y_ptr"
    types = NUMBERS | dict.fromkeys(names, pointer) | {"in_features": "i32", "stride_wn": "i32"}
    types |= dict.fromkeys(("stats_ptr", "bias_ptr", "lora_bias_ptr"), FP32)
    constants = {"PACKED": packed, "BLOCKSIZE": 64, "NESTED": 256, "ROUND": 0, "RANK": 12, "BLOCK_M": block_m}
    constants |= {"BLOCK_N": 16 if block_m == 1 else 32, "BLOCK_K": 256, "BLOCK_R": 16}
    constants |= {"h_ptr": None} if fold else {"a_ptr": None}
    if packed:
        types |= {name: UNPACK4[name] for name in SCALES4} | {"w_ptr": "*u8"}
    else:
        constants |= dict.fromkeys(SCALES4)
    return "small_batch", "small_batch_fwd_kernel", types, constants


UNPACK4 = {
    "data_ptr": "*u8", "absmax_ptr": "*u8", "code_ptr": FP32, "outer_ptr": FP32, "outer_code_ptr": FP32,
    "offset_ptr": FP32, "w_ptr": BF16, "first": "i32", "elements": "i32",
}  # fmt: skip
SCALES4 = "absmax_ptr", "code_ptr", "outer_ptr", "outer_code_ptr", "offset_ptr"


def beside_of(gradient):
    types = UNPACK4 | {
        "x_ptr": BF16,
        "thin_ptr": BF16,
        "product_ptr": FP32 if gradient else BF16,
        "in_features": "i32",
    }
    types |= {"tokens": "i32", "products": "i32"}
    constants = {"BLOCKSIZE": 64, "NESTED": 256, "ROUND": 0, "BLOCKS": 32, "RANK": 12, "GRADIENT": gradient}
    return "beside", "beside4_kernel", types, constants | {"BLOCK_I": 64, "BLOCK_C": 64, "BLOCK_R": 16}


def whole_of(back, tiles):
    names = ("t_ptr", "x_ptr", "dx_ptr") if back else ("x_ptr", "h_ptr", "v_ptr", "y_ptr")
    types = NUMBERS | dict.fromkeys((*names, "w_ptr", "a_ptr", "b_ptr"), BF16) | {"ready_ptr": "*i32"}
    types |= dict.fromkeys(("stats_ptr", "bias_ptr", "lora_bias_ptr", "da_ptr", "partial_ptr"), FP32)
    types |= {"in_features": "i32", "stride_wn": "i32"}
    block_m, columns, summed, warps, stages, group = tiles
    sizes = {"BLOCK_M": block_m, "BLOCK_R": 16, "GROUP": group, "num_warps": warps, "num_stages": stages}
    sizes |= {"BLOCK_K": columns, "BLOCK_N": summed} if back else {"BLOCK_N": columns, "BLOCK_K": summed}
    return "whole", "whole_bwd_kernel" if back else "whole_fwd_kernel", types, sizes | {"RANK": 12}


UNPACK_GROUPS = {
    "words_ptr": "*i32", "scale_ptr": BF16, "zero_ptr": "*i32", "group_ptr": "*i32", "w_ptr": BF16,
    **dict.fromkeys(("first", "last", "out_features", "in_features", "plane_rows", "cycle_rows"), "i32"),
}  # fmt: skip
GPTQ, AWQ, INTERLEAVED, HQQ_ALONG, HQQ_ACROSS = 32, 33, 34, 40, 41


def unpack_groups(layout, group, bits, count=1, **pointers):
    """None for a pointer says that it is not given."""
    constants = {
        "LAYOUT": layout,
        "GROUP": group,
        "BITS": bits,
        "COUNT": count,
        "ROUND": 1,
        "BLOCK_M": 64,
        "BLOCK_K": 64,
    }
    absent = {name: None for name, pointer in pointers.items() if pointer is None}
    return "packed_groups", "dequantise_groups_kernel", UNPACK_GROUPS | pointers, constants | absent


def norm_of_groups(layout, group, bits, count=1, weight=tl.int32, zero=tl.int32, order=None):
    types = {"SCALE_TYPE": tl.bfloat16, "ZERO_TYPE": zero, "GROUP_TYPE": order, "LAYOUT": 2}
    return norm_of(weight, **types, FORMAT=layout, BLOCKSIZE=group, BITS=bits, COUNT=count)


HQQ = {"words_ptr": "*u8", "zero_ptr": BF16, "group_ptr": None}
KERNELS = {
    "cast": ("refresh", "cast_fwd_kernel", TABLE | {"copy_ptr": BF16}, {"SOURCE": tl.float32, "BLOCK": 4096}),
    "norm of a plain weight": norm_of(tl.bfloat16, FORMAT=0),
    "norm of 4 bits": norm_of(
        tl.uint8, FORMAT=4, SCALE_TYPE=tl.uint8, LAYOUT=2, BLOCKSIZE=64, NESTED=256, ROWS=2
    ),
    "norm, rank 384": norm_of(tl.bfloat16, FORMAT=0, **norm_constants(384, 2, False)),
    "norm, rank 384, wide": norm_of(tl.bfloat16, FORMAT=0, **norm_constants(384, 2, True)),
    "norm, rank 384, fp32": norm_of(
        tl.bfloat16, "*fp32", FORMAT=0, FACTOR_TYPE=tl.float32, **norm_constants(384, 4, False)
    ),
    "norm of 8 bits": norm_of(tl.int8, FORMAT=8, LAYOUT=2),
    "compose, bf16": forward_of(BF16),
    "compose, fp32": forward_of(FP32),
    "compose, rank 384": forward_of(BF16, RANK=384, BLOCK_M=128, BLOCK_R=64),
    "gradient, bf16": backward_of(BF16),
    "gradient, fp32": backward_of(FP32),
    "gradient in one part": backward_of(BF16, split=False),
    "dequantise 4 bits": (
        "packed4", "dequantise4_kernel", UNPACK4, {"BLOCKSIZE": 64, "NESTED": 256, "ROUND": 0, "BLOCKS": 32}
    ),
    "4 bits beside x Aᵀ": beside_of(False),
    "4 bits beside dhᵀ x": beside_of(True),
    "a whole pass": whole_of(False, (64, 64, 32, 4, 2, 8)),
    "a whole pass, wide": whole_of(False, whole_tiles(1024, 4096)),
    "a whole gradient": whole_of(True, (64, 64, 32, 4, 2, 8)),
    "a whole gradient, wide": whole_of(True, whole_tiles(1024, 4096)),
    "one token": small_batch_of(BF16, 1),
    "one token, 4 bits": small_batch_of(BF16, 1, packed=True),
    "one token, fp32": small_batch_of(FP32, 1, fold=False),
    "few tokens": small_batch_of(BF16, 16),
    "few tokens, fp32": small_batch_of(FP32, 16, fold=False),
    "dequantise 8 bits": (
        "packed8", "dequantise8_kernel",
        {
            "data_ptr": "*i8", "scb_ptr": FP32, "w_ptr": BF16, "first": "i32", "last": "i32", "out_features": "i32",
            "in_features": "i32",
        },
        {"BLOCK_M": 8, "BLOCK_K": 512},
    ),
    "dequantise GPTQ": unpack_groups(GPTQ, 128, 4, group_ptr=None),
    "dequantise GPTQ in any order": unpack_groups(GPTQ, 0, 4),
    "dequantise GPTQ of 3 bits": unpack_groups(GPTQ, 32, 3, group_ptr=None),
    "dequantise AWQ": unpack_groups(INTERLEAVED, 128, 4, group_ptr=None),
    "dequantise HQQ": unpack_groups(HQQ_ALONG, 64, 4, 2, **HQQ),
    "dequantise HQQ across": unpack_groups(HQQ_ACROSS, 0, 4, 2, **HQQ),
    "norm of GPTQ": norm_of_groups(GPTQ, 128, 4),
    "norm of GPTQ in any order": norm_of_groups(GPTQ, 0, 4, order=tl.int32),
    "norm of AWQ": norm_of_groups(INTERLEAVED, 128, 4),
    "norm of HQQ": norm_of_groups(HQQ_ALONG, 64, 4, 2, tl.uint8, tl.bfloat16),
}  # fmt: skip


def test_no_kernel_is_left_out():
    folder = importlib.import_module("peft.dora.kernels").__path__
    found = set()
    for module in pkgutil.iter_modules(folder):
        for name, value in vars(importlib.import_module(f"peft.dora.kernels.{module.name}")).items():
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                found.add((value.fn.__module__.rpartition(".")[2], name))
    assert found == {row[:2] for row in KERNELS.values()}


@pytest.mark.works_with("Triton", "each kernel compiles for NVIDIA's Ampere and Hopper and for AMD's MI300")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name, target):
    wanted = TARGETS[target]
    if {"cuda": "nvidia", "hip": "amd"}[wanted.backend] not in backends:
        pytest.skip(f"this triton has no backend for {wanted.backend}")
    if name.endswith("wide") and (target == "MI300" or "whole" in name and target == "Ampere"):
        pytest.skip("tiles for GPUs with more shared memory")
    module, kernel, types, constants = KERNELS[name]
    function = getattr(importlib.import_module(f"peft.dora.kernels.{module}"), kernel)
    options = {key: constants[key] for key in ("num_warps", "num_stages") if key in constants}
    constants = {arg: value for arg, value in constants.items() if arg in function.arg_names}
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in function.arg_names}
    places = {(function.arg_names.index(arg),): value for arg, value in constants.items()}
    # As at a launch: pointers to whole tensors are multiples of 16 bytes, and only then are loads staged.
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, arg in enumerate(function.arg_names) if signature[arg].startswith("*")
    }
    compiled = triton.compile(ASTSource(function, signature, places, aligned), target=wanted, options=options)
    assert compiled.asm
    assert compiled.metadata.shared <= SHARED[target] * 1024
