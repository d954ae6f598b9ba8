# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Ways of using A and B other than plain LoRA, one file an idea."""

from .dora import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
    _DoraConvNdVariant,
)

__all__ = [
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "DoraEmbeddingVariant",
    "DoraLinearVariant",
    "_DoraConvNdVariant",
]
