# make demo   set everything up and decompile the bundled model
# make test   set everything up and pass the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs benchmarks clean

.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.base
	$(BIN)/unweave decompile zoo:induction -o demo --overwrite
	cp demo/report.html report.html
	@echo "open report.html in a browser"

test: .venv/.dev
	$(BIN)/python -m pytest

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev
	$(BIN)/mkdocs build --strict --quiet

benchmarks: .venv/.dev
	$(BIN)/python -m benchmarks.run all

clean:
	rm -rf .venv demo report.html site
