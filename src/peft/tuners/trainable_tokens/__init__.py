# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Training some rows of an embedding, for new or repurposed tokens, and nothing else of it."""

from .config import TrainableTokensConfig
from .layer import TrainableTokensLayer
from .model import TrainableTokensModel

__all__ = ["TrainableTokensConfig", "TrainableTokensLayer", "TrainableTokensModel"]
