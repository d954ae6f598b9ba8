# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Ways of using A and B other than plain LoRA, one file an idea."""

from ..layer.variant import LoraVariant
from .additive import AdditiveVariant
from .alora import (
    ALoraDoraLinearVariant,
    ALoraLinearVariant,
    calculate_alora_offsets,
    get_alora_offsets_for_forward,
    get_alora_offsets_for_generate,
    is_alora_relevant_in_batch,
)
from .arrow import ArrowLinearVariant
from .bdlora import BdLoraLinearVariant, BlockDiagonalLinear
from .dora import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
    DoraParameterVariant,
    _DoraConvNdVariant,
)
from .kasa import KasaLinearVariant
from .mica import MiCAEmbeddingVariant, MiCALinearVariant
from .monteclora import MontecloraLinearVariant
from .qalora import QALoraLinearVariant
from .velora import VeloraLinearVariant

__all__ = [
    "ALoraDoraLinearVariant",
    "ALoraLinearVariant",
    "AdditiveVariant",
    "ArrowLinearVariant",
    "BdLoraLinearVariant",
    "BlockDiagonalLinear",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "DoraEmbeddingVariant",
    "DoraLinearVariant",
    "DoraParameterVariant",
    "KasaLinearVariant",
    "LoraVariant",
    "MiCAEmbeddingVariant",
    "MiCALinearVariant",
    "MontecloraLinearVariant",
    "QALoraLinearVariant",
    "VeloraLinearVariant",
    "_DoraConvNdVariant",
    "calculate_alora_offsets",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
    "is_alora_relevant_in_batch",
]
