# make demo   a trained ZAYA answers questions        make test    everything CI checks
# make setup  only the environment                    make oracle  the PyTorch reference environment
# make rocm-aot      compiles everything for the MI300X, without one
# make mi300x        checks and measures on an AMD GPU   make kernels-cuda  tests kernels on an NVIDIA GPU
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test setup oracle lock notebooks rocm-aot mi300x kernels-cuda

demo: setup
	$(BIN)/zaya demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

setup: $(VENV)/.installed

$(VENV)/.installed: .ci/constraints.txt pyproject.toml
	python=$$(PYTHON=$(PYTHON) sh .ci/find-python 3.12) && "$$python" -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes \
		-r .ci/constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Python 3.11, as CPU PyTorch comes for it.
oracle: .venv-oracle/.installed

.venv-oracle/.installed: .ci/oracle-constraints.txt
	python=$$(PYTHON=$(ORACLE_PYTHON) sh .ci/find-python 3.11) && "$$python" -m venv --clear .venv-oracle
	.venv-oracle/bin/python -m pip install -q --disable-pip-version-check -r .ci/oracle-constraints.txt
	touch $@

# XLA's compiler for AMD GPUs lives apart from the project's environment.
ROCM := .rocm

rocm-aot: setup $(ROCM)/.installed
	PYTHONPATH=$(ROCM) $(BIN)/python -m pytest -q tests/gate
	PYTHONPATH=$(ROCM) $(BIN)/python -m pallas_kernels.rocm.report
	PYTHONPATH=$(ROCM) $(BIN)/python -m train.aot

$(ROCM)/.installed: .ci/rocm-constraints.txt
	rm -rf $(ROCM)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(ROCM) \
		--require-hashes -r .ci/rocm-constraints.txt
	touch $@

# On a machine with ROCm (docs/amd.md); elsewhere it skips what needs a GPU, and says so.
mi300x: setup
	$(BIN)/python -m train.mi300x

# Not AMD: the same Triton kernels, on whatever NVIDIA GPU JAX finds.
kernels-cuda: setup
	@$(BIN)/python -c "import sys, jax; \
		sys.exit(None if jax.default_backend() == 'gpu' else 'JAX finds no NVIDIA GPU (docs/amd.md)')"
	$(BIN)/python -m pytest -q tests/pallas_kernels -k kernel
	@echo "NOT AMD: these kernels ran on an NVIDIA GPU."

# Renews the pinned versions after a change of the dependencies in pyproject.toml.
lock:
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile -q pyproject.toml --universal --python-version 3.12 --extra dev \
		--generate-hashes --no-annotate --no-header --upgrade -o .ci/constraints.txt

# Executes the notebooks' scripts into their .ipynb pairs.
notebooks: setup
	$(BIN)/jupytext --to ipynb --execute notebooks/*.py
