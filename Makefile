# `make` prints what there is. Every target makes the environment that it needs, so each works in a fresh clone.

PYTHON ?= python3
VENV   ?= .venv
# Handed to pip before anything else, so that this one line decides which build of torch every environment holds.
# The default is the release that the suite runs on; for another build say, for example,
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
# Test processes, each with one thread: they are many small tensors.
JOBS   ?= 2
ARGS   ?=

BIN    := $(VENV)/bin
PY     := $(BIN)/python
CHECKED := src tests examples benchmarks docs setup.py

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help finetune test test-all quality style bench docs clean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

finetune: $(VENV)/.ready-finetune  ## fine-tune a quantised model with DoRA (ARGS="--model … --data …"; nothing needed)
	$(PY) examples/dora_finetuning/dora_finetuning.py $(ARGS)

test: $(VENV)/.ready-test  ## run the suite (ARGS="tests/dora -k norm" for a part of it)
	PEFT_REQUIRE_INTEROP=$${PEFT_REQUIRE_INTEROP-1} OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
	$(PY) -m pytest -q -n $(JOBS) --dist worksteal -m "not slow" $(ARGS)

test-all: $(VENV)/.ready-test  ## run the suite with its slow tests, the main job of `make finetune` among them
	PEFT_REQUIRE_INTEROP=$${PEFT_REQUIRE_INTEROP-1} OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
	$(PY) -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

quality: $(VENV)/.ready-quality  ## check style and formatting
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

style: $(VENV)/.ready-quality  ## put style and formatting right
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

bench: $(VENV)/.ready-bench  ## measure beside upstream, check the rows, draw them (a GPU; on a CPU the tiny cases)
	$(PY) benchmarks/run.py --verify $(ARGS)
	$(PY) benchmarks/losses.py
	$(PY) benchmarks/verify.py
	$(PY) benchmarks/plot.py
	$(PY) benchmarks/table.py --write

docs: $(VENV)/.ready-docs  ## build the documentation into docs/build
	$(PY) docs/formats.py --write
	$(PY) -m sphinx -W --keep-going -q -b html docs/source docs/build
	@echo "docs/build/index.html"

clean:  ## remove the environment and everything built
	rm -rf $(VENV) docs/build build dist src/*.egg-info

$(PY):
	$(PYTHON) -m venv $(VENV)

# .ready-NAME: the package, in place, with the extra of that name.
$(VENV)/.ready-%: setup.py | $(PY)
	$(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet --editable ".[$*]"
	@touch $@
