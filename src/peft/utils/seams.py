# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Names that other packages replace at run time: looked up in their public module at the moment of the call."""

from __future__ import annotations

import importlib
from typing import Any


def public(module: str, name: str) -> Any:
    """The object that `module` exports as `name` right now.

    Packages that speed up or patch training assign to such names (`peft.tuners.tuners_utils.cast_adapter_dtype`, for
    one); a name imported at the top of a file would keep the old object.
    """
    return getattr(importlib.import_module(module), name)
