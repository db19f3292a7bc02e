# make demo   a trained ZAYA answers questions        make test    everything CI checks
# make setup  only the environment                    make oracle  the PyTorch reference environment
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test setup oracle lock notebooks

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
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r .ci/constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Python 3.11, as CPU PyTorch comes for it.
oracle: .venv-oracle/.installed

.venv-oracle/.installed: .ci/oracle-constraints.txt
	python=$$(PYTHON=$(ORACLE_PYTHON) sh .ci/find-python 3.11) && "$$python" -m venv --clear .venv-oracle
	.venv-oracle/bin/python -m pip install -q --disable-pip-version-check -r .ci/oracle-constraints.txt
	touch $@

# Renews the pinned versions after a change of the dependencies in pyproject.toml.
lock:
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile -q pyproject.toml --universal --python-version 3.12 --extra dev \
		--generate-hashes --no-annotate --no-header --upgrade -o .ci/constraints.txt

# Executes the notebooks' scripts into their .ipynb pairs.
notebooks: setup
	$(BIN)/jupytext --to ipynb --execute notebooks/*.py
