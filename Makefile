PYTHON ?= python3
VENV = .venv

.PHONY: setup test test-slow test-all test-slurm faults demo gpu-check lint clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

# The tests to run after every change, a few minutes.
test: setup
	$(VENV)/bin/python -m pytest

# The other tests, which are slow, with a sample of the faults.
test-slow: setup
	$(VENV)/bin/python -m pytest -m "slow and not faults"

test-all: test test-slow

# run.sh under a real SLURM, which these tests start on this machine alone, as root, with Debian's packages
# slurmctld, slurmd, slurm-client and munge: a few minutes. Where a SLURM is configured they are skipped.
test-slurm: setup
	$(VENV)/bin/python -m pytest tests/slurm -m slurm

# The whole tables of tests/faults: hours.
faults: setup
	$(VENV)/bin/python -m pytest tests/faults -m ""

# On recorded speech that comes with it; `make demo DATA=FOLDER` takes your own recordings, of any format.
demo: setup
	python=$(VENV)/bin/python DATA="$(DATA)" bash demo/demo.sh

gpu-check: setup
	$(VENV)/bin/python benchmarks/gpu_check.py --json gpu_check.json

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) exp/demo
