# Everything starts from a bare checkout: each target first makes .venv with what it needs.
#   make demo    train on QM9 (METHOD=igb_v2+db_mtl names what to compare, RANKS=2 makes two processes share each batch,
#                ARGS="--epochs 5" passes flags on)
#   make test    lint, types, C++ and Python tests
#   make bench   benchmarks against PyTorch and the copy floor
#   make build   rebuild the compiled module in place after a change in csrc
# One is for a machine with a GPU, nvcc and all that is needed in PYTHON, and uses neither .venv nor a network:
#   make gpu-check    build with nvcc, GPU tests, compute-sanitizer, GPU benchmarks

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
ARGS ?=
WORKERS ?= 2
# Code for one GPU architecture is enough to develop and test with; "80-real;90" makes more.
demo test bench build: export CUDAARCHS ?= 90
test build: export CUDAFLAGS ?= -Werror=all-warnings
METHOD ?=
RANKS ?=
RESULTS ?= benchmarks/results/latest.json

.PHONY: demo test bench build lint clean gpu-check

demo: $(VENV)/demo $(if $(findstring igb_v2,$(METHOD) $(ARGS)),$(VENV)/igbv2)
	$(PY) $(if $(RANKS),-m torch.distributed.run --standalone --nproc-per-node $(RANKS)) examples/qm9/train.py \
		$(if $(METHOD),--methods equal $(filter-out equal,$(METHOD))) $(ARGS)

# One thread for each process: more get into each other's way. The tests of threads ask for theirs.
test: build lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses $(WORKERS) --no-loadscope-reorder $(ARGS)

bench: build
	$(PY) -m pytest benchmarks --benchmark-enable --benchmark-columns=median,iqr,rounds --results=$(RESULTS) $(ARGS)

gpu-check:
	PYTHON="$(PYTHON)" benchmarks/gpu_check.sh

build: $(VENV)/dev
	$(PY) setup.py --quiet build_ext --inplace

lint: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The stamp files stand for what is installed; a change in the dependencies installs again.
$(VENV)/tools: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet -c constraints.txt torch numpy "setuptools>=77" pybind11 "cmake>=3.24" ninja
	touch $@

$(VENV)/demo: $(VENV)/tools
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable ".[demo]"
	touch $@

$(VENV)/igbv2: $(VENV)/demo
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable ".[igbv2]"
	touch $@

$(VENV)/dev: $(VENV)/tools
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable ".[demo,dev]"
	$(PIP) install --quiet --no-deps "LibMTL>=1.1.5"  # among its dependencies is an old torchvision
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info igb_kernels/_C*.so
