# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The category of the package's warnings, so that they can be filtered by one name."""


class PeftWarning(UserWarning):
    """Base class of the warnings that this package issues."""
