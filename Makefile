# make demo   the whole job on a generated world, into demo/
# make test   all tests
# make test-fast  the tests that neither take long nor start processes
# make lint   static checks
# Each first creates the virtual environment .venv from requirements.txt.
# Another Python: make PYTHON=python3.12 test. Another PyTorch build: see README.md.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
# Two more than there are CPUs, as some tests wait for processes; each takes about 2 GB of memory.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(4, 2 + os.cpu_count()))")

.PHONY: env demo test test-fast lint clean

env: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.txt
	touch $@

demo: env
	$(VENV)/bin/python make_demo.py --out demo

test: env
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: env
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not processes and not gpu"

lint: env
	$(VENV)/bin/python -m ruff check .

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache
