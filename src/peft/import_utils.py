# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Which optional packages are installed, found out without importing them wherever their metadata tells."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import lru_cache

import packaging.version
import torch

_GPTQMODEL_MINIMUM = packaging.version.parse("7.0.0")
_OPTIMUM_MINIMUM = packaging.version.parse("1.24.0")
_TORCHAO_MINIMUM = packaging.version.parse("0.16.0")
_BNB_4BIT_MINIMUM = packaging.version.parse("0.39.0")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _version(distribution: str) -> packaging.version.Version:
    return packaging.version.parse(importlib.metadata.version(distribution))


def _require(distribution: str, minimum: packaging.version.Version) -> None:
    found = _version(distribution)
    if found < minimum:
        raise ImportError(
            f"{distribution} {found} is installed, but at least {minimum} is needed: run "
            f'`pip install "{distribution}>={minimum}"`, or uninstall it'
        )


_transformers = _version("transformers")
is_transformers_le_4_53 = _transformers < packaging.version.parse("4.54.0.dev0")
is_transformers_ge_v5 = _transformers >= packaging.version.parse("5.0.0.dev0")
is_transformers_ge_v5_1_0 = _transformers >= packaging.version.parse("5.1.0.dev0")
is_transformers_ge_v5_4_0 = _transformers >= packaging.version.parse("5.4.0.dev0")
is_transformers_ge_v5_6_0 = _transformers >= packaging.version.parse("5.6.0.dev0")
is_transformers_ge_v5_13_0 = _transformers >= packaging.version.parse("5.13.0.dev0")
is_transformers_ge_v5_17_0 = _transformers >= packaging.version.parse("5.17.0.dev0")
# Tensor parallelism over DTensor lives in a package of its own.
is_transformers_dtensor_tp = _installed("transformers.distributed") and _installed(
    "transformers.distributed.tensor_parallel"
)


@lru_cache
def is_bnb_available() -> bool:
    """bitsandbytes is installed."""
    return _installed("bitsandbytes")


@lru_cache
def is_bnb_4bit_available() -> bool:
    """bitsandbytes is installed in a version that has 4-bit layers."""
    return is_bnb_available() and _version("bitsandbytes") >= _BNB_4BIT_MINIMUM


@lru_cache
def is_optimum_available() -> bool:
    """optimum is installed."""
    return _installed("optimum")


@lru_cache
def is_gptqmodel_available() -> bool:
    """gptqmodel is installed, and optimum, through which transformers loads its models.

    Raises:
        ImportError: One of the two is too old, or optimum is missing.
    """
    if not _installed("gptqmodel"):
        return False
    _require("gptqmodel", _GPTQMODEL_MINIMUM)
    if not is_optimum_available():
        raise ImportError(
            f'gptqmodel is installed, but optimum is not: run `pip install "optimum>={_OPTIMUM_MINIMUM}"`'
        )
    _require("optimum", _OPTIMUM_MINIMUM)
    return True


@lru_cache
def is_torchao_available() -> bool:
    """torchao is installed.

    Raises:
        ImportError: It is too old.
    """
    if not _installed("torchao"):
        return False
    _require("torchao", _TORCHAO_MINIMUM)
    return True


@lru_cache
def is_torchao_ge_v0_18_0() -> bool:
    """torchao is installed in version 0.18 or newer."""
    return is_torchao_available() and _version("torchao") >= packaging.version.parse("0.18.0")


@lru_cache
def is_aqlm_available() -> bool:
    """aqlm is installed."""
    return _installed("aqlm")


@lru_cache
def is_eetq_available() -> bool:
    """eetq is installed."""
    return _installed("eetq")


@lru_cache
def is_hqq_available() -> bool:
    """hqq is installed."""
    return _installed("hqq")


@lru_cache
def is_inc_available() -> bool:
    """Intel Neural Compressor is installed."""
    return _installed("neural_compressor")


@lru_cache
def is_te_available() -> bool:
    """Transformer Engine is installed."""
    return _installed("transformer_engine")


@lru_cache
def is_te_pytorch_available() -> bool:
    """Transformer Engine is installed with its PyTorch part. Looking for it imports the package."""
    return is_te_available() and _installed("transformer_engine.pytorch")


@lru_cache
def is_diffusers_available() -> bool:
    """diffusers is installed."""
    return _installed("diffusers")


@lru_cache
def is_torch_tpu_available(check_device: bool = True) -> bool:
    """torch_xla is installed and, with `check_device`, has a device to offer."""
    if not _installed("torch_xla"):
        return False
    if not check_device:
        return True
    import torch_xla.core.xla_model as xla

    try:
        xla.xla_device()
    except RuntimeError:
        return False
    return True


@lru_cache
def is_xpu_available(check_device: bool = False) -> bool:
    """This torch has Intel GPU support with a device present and, with `check_device`, one that answers."""
    if not (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return False
    if not check_device:
        return True
    try:
        torch.xpu.get_device_properties(0)
    except RuntimeError:
        return False
    return True
