# Each target that runs something makes the virtual environment first, from nothing but Python >= 3.11 and pip.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed ## train two tiny models on the text that comes with Python and compare them
	$(BIN)/metatokens demo $(DEMO_FLAGS)

test: .venv/installed ## every test
	$(BIN)/pytest --numprocesses 2 --dist loadgroup

check: .venv/installed ## format, lint, types and the quick tests
	$(BIN)/ruff format --check src tests benchmarks experiments
	$(BIN)/ruff check src tests benchmarks experiments
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 -m "not slow" tests/unit tests/claims tests/test_architecture.py

clean: ## remove the virtual environment and the demonstration
	rm -rf .venv demo
