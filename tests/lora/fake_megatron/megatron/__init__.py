# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""A stand-in for the few parts of megatron-core that LoRA uses, built to its documented interface, for gloo."""
