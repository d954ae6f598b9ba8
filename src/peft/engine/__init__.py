# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The machine every tuner runs in: layers, injection, targets, state. It knows no method by name."""
