# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Exceptions that callers may want to tell from other errors of the same built-in kind."""


class PeftError(Exception):
    """Base class of the package's own exceptions."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A config or a state dict names no module or parameter of the model it is applied to."""
