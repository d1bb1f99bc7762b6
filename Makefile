# Each target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: lab test lint bench clean

lab: .venv/lab.done  ## the whole lab on MNIST: report in lab/report.html
	$(BIN)/vaelab study removing-kl --out lab

test: .venv/dev.done  ## the tests
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: .venv/dev.done  ## the linters
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

bench: .venv/bench.done  ## vaelab beside reference loops and other libraries, interleaved (an hour)
	$(BIN)/python -m benchmarks

clean:  ## removes the environment, never results
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vaelab needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11 lab" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/lab.done: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . && touch $@

.venv/dev.done: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' && touch $@ .venv/lab.done

.venv/bench.done: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]' && touch $@ .venv/lab.done
