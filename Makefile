# make demo | test | bench | notebooks   (PYTHON=python3.12 make test picks another interpreter)
PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo test bench notebooks clean

# Each stamp is made anew when the requirements change.
.venv/installed: settings.ini setup.py pyproject.toml $(wildcard lib/lamella/vision/*.c)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

.venv/installed-bench: .venv/installed
	$(BIN)/python -m pip install -q -e '.[bench]'
	touch $@

demo: .venv/installed
	$(BIN)/python -m lamella.demo --out demo

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 -q --durations=25 tests

bench: .venv/installed-bench
	$(BIN)/python bench/run.py
	$(BIN)/python bench/serving.py

notebooks: .venv/installed-dev
	$(BIN)/python tests/notebooks.py --save

clean:
	rm -rf .venv demo build lib/*.egg-info
