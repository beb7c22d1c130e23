# make demo: train SRLoRA on two CPU processes on real sentences for a few minutes, from nothing but Python, pip, make
# and a compiler.
# make unit: the quick unit tests, two to three minutes.
# make test: lint and every test that needs no GPU, about 20 minutes on two slow cores, two files at a time; make test-all adds the slow ones.
# make cluster: many nodes on one machine, see docs/multi-node.md; needs root, iproute2, slurm-wlm and munge.

PYTHON ?= python3
VENV ?= .venv
BIN = $(abspath $(VENV))/bin
# DeepSpeed compiles a small operator with the ninja of this environment.
export PATH := $(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: install demo lint unit test test-all cluster clean

install: $(VENV)/.installed

# torch comes first and alone: another package would pull the newest one with gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	touch $@

# What DeepSpeed compiles when it is first used, which takes minutes: no test waits for the compiler.
$(VENV)/.compiled: $(VENV)/.installed
	DS_ACCELERATOR=cpu $(BIN)/python -c "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load()" & \
	DS_ACCELERATOR=cpu $(BIN)/python -c "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder as B; B().load()" && wait
	touch $@

demo: install
	$(BIN)/accelerate launch --config_file launch/accelerate/cpu2.yaml launch/train.py --train.max_steps 160

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

unit: install
	$(BIN)/pytest tests/unit -n 2 -m "not slow and not long"

test: lint $(VENV)/.compiled
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: lint $(VENV)/.compiled
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m ""

cluster: install
	$(BIN)/pytest tests/cluster -rs

clean:
	rm -rf $(VENV) runs build *.egg-info
