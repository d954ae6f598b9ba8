# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Package metadata: what a user installs, and the extras that the Makefile's environments are made of."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The interface we match, then ours: 0.21.2+triton.1 satisfies `peft==0.21.2`.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/peft/__init__.py").read_text("utf-8"), re.MULTILINE)[1]

# The lower bounds of torch and transformers are versions that the whole suite has run on.
REQUIREMENTS = [
    "numpy>=1.24",
    "packaging>=20.0",
    "psutil",
    "pyyaml",
    "torch>=2.11.0",
    "transformers>=5.23.0,<5.24",  # 5.24 asks for the adapters of peft 0.22
    "tqdm",
    "accelerate>=1.10.0",
    "safetensors>=0.5.0",
    "huggingface_hub>=1.0.0",
]

BNB = ["bitsandbytes>=0.49.0"]
HQQ = ["hqq>=0.2.8"]
# Storage formats whose libraries install and quantise on a CPU.
FORMATS = [*HQQ, "torchao>=0.18.0", "compressed-tensors>=0.20.0", "aqlm>=1.1.7", "neural-compressor-pt>=3.10"]
TRITON = ["triton>=3.6.0; platform_system == 'Linux'"]
QUALITY = ["ruff>=0.14"]
DOCS = ["sphinx>=8.1", "myst-parser>=4.0", "furo"]
EXAMPLES = ["datasets>=4.0", "tokenizers", *BNB]
PLOTS = ["matplotlib"]
# Other people's loops. None of them asks for an adapter library, so none brings another `peft`.
LOOPS = ["trl>=1.16.0", "sentence-transformers>=6.2.0", "diffusers>=0.42.0"]
# Its source distribution compiles nothing when it is installed, and needs no torch for that.
SHARDING = ["deepspeed>=0.19.8; platform_system == 'Linux'"]
TEST = [
    "pytest>=8.0", "pytest-timeout", "pytest-xdist", "parameterized",
    *EXAMPLES, *PLOTS, *TRITON, *FORMATS, *LOOPS, *SHARDING,
]  # fmt: skip

setup(
    name="peft",
    version=VERSION,
    description="Parameter-efficient fine-tuning with a fast DoRA: a drop-in for Hugging Face PEFT.",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="deep learning, transformers, PEFT, LoRA, DoRA, QLoRA, Triton",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"peft": ["py.typed", "dora/README.md", "dora/kernels/tuned/*.json"]},
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require={
        "bnb": BNB,
        "hqq": HQQ,
        "triton": TRITON,
        "examples": EXAMPLES,
        "finetune": [*EXAMPLES, *TRITON],
        "bench": TEST,
        "quality": QUALITY,
        "docs": DOCS,
        "test": TEST,
        "dev": [*TEST, *QUALITY, *DOCS],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
