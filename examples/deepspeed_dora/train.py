# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The script of ../fsdp_qdora with a base that is not quantised, for accelerate's DeepSpeed configs in this folder.

accelerate launch --config_file zero3.yaml train.py --model meta-llama/Llama-3.1-8B --data my_text.jsonl
DS_ACCELERATOR=cpu accelerate launch --config_file zero3_cpu.yaml train.py --smoke       # two CPU ranks
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv[1:1] = ["--quant", "none"]
    runpy.run_path(str(Path(__file__).parents[1] / "fsdp_qdora" / "train.py"), run_name="__main__")
