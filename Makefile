# Everything runs in .venv, made on first use. Pass parameters with ARGS: make run ARGS="-p steps=500"

PYTHON ?= python3
ARGS ?=
PIP_INSTALL = .venv/bin/python -m pip install -c constraints.txt

.PHONY: run test lab app bench lint clean

run: .venv/installed
	.venv/bin/mtx run --preset quick --out outputs/quickstart $(ARGS)

test: .venv/installed-test
	.venv/bin/python -m pytest $(ARGS)

# JupyterLab on this machine only; it prints its address with the token
lab: .venv/installed
	.venv/bin/jupyter lab --ip=127.0.0.1 $(ARGS)

# The widgets of notebook 06 as a page on this machine only
app: .venv/installed
	.venv/bin/mtx app $(ARGS)

# Speed against baselines: one table, kept as outputs/reference/bench.json
bench: .venv/installed
	.venv/bin/python benchmarks/bench.py $(ARGS)

lint: .venv/installed-test
	.venv/bin/ruff check .

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"expected Python 3.11 or newer, got {sys.version.split()[0]}; say make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP_INSTALL) -e .
	touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP_INSTALL) -e '.[test]'
	touch .venv/installed $@

# Removes runs (never outputs/reference), corpora and token stores, and Python's caches; keeps .venv
clean:
	mkdir -p outputs data
	find outputs -mindepth 1 -maxdepth 1 ! -name reference -exec rm -rf {} +
	find data -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
	rm -rf build mtxlib.egg-info .pytest_cache .ruff_cache wandb
