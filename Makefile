# An active environment whose python imports torch is used as it is: pip adds only what is missing, with torch and triton
# pinned to what is installed. Otherwise .venv is made. TORCH is one exact version: given a range, pip on Linux may settle
# on a build with gigabytes of CUDA libraries; the extra index offers the CPU build of this version, which pip prefers.
SHELL := /bin/bash
TORCH := torch==2.13.0
ACTIVE := $(shell python -c "import torch" >/dev/null 2>&1 && echo yes)
PY := $(if $(ACTIVE),python,.venv/bin/python)
PROBE := import accelerate, expecttest, hypothesis, jinja2, matplotlib, minifuse, mypy, networkx, pytest, rich, ruff, scipy, sklearn, transformers, triton, xdist; \
         from importlib.metadata import entry_points as e; e(group="torch_dynamo_backends")["minifuse"]

.PHONY: env test demo fuzz conformance models kernels bench gpu

env:
	@test -n "$(ACTIVE)" || test -x $(PY) || python3 -m venv .venv
	@test -n "$(ACTIVE)" || $(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	@cd /tmp && $(if $(ACTIVE),python,$(CURDIR)/.venv/bin/python) -c '$(PROBE)' 2>/dev/null || (cd $(CURDIR) && \
	  pinned=$$(mktemp) && $(PY) -m pip list --format=freeze | grep -E '^(torch|triton)==' > $$pinned; \
	  $(PY) -m pip install -q -c $$pinned -e '.[dev,examples]'; status=$$?; rm -f $$pinned; exit $$status)

# One thread a worker: two workers with two spinning threads each are many times slower on two cores.
test: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not gpu"

demo: env
	$(PY) -m examples.gpt_on_text

conformance: env
	$(PY) -m tests.conformance

# A training step of every family of models beside eager; `make test` takes a tenth of them.
models: env
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m tests.models

fuzz: env
	$(PY) -m tests.fuzz
	$(PY) -m tests.fuzz --fusible --count 10000
	$(PY) -m tests.fuzz --calls --count 1000

bench: env
	$(PY) -m benchmarks.cpu
	$(PY) -m benchmarks.traffic
	$(PY) -m benchmarks.memory_roof
	$(PY) -m benchmarks.compile_time
	$(PY) -m benchmarks.overhead
	$(PY) -m benchmarks.peak
	$(PY) -m benchmarks.products

# Minutes to hours: every Triton kernel of the model set compiled for four GPUs, small models in Triton's interpreter.
kernels: env
	$(PY) -m tests.kernels

# For a machine with a GPU that may have no network: installs nothing, and takes under nine minutes. The tests' exit
# status, the benchmark's and its table are in one JSON; tests that fail keep no row from being measured.
gpu:
	$(PY) -m benchmarks.gpu --tests --warm 4 --seconds 420
