# make demo    trains, decomposes and measures the example of the README
# make test    runs all tests
# make check   ruff and pyright
# make wheel   installs into a bare environment, without any extra, and tries it there
# Each sets up what it needs. Arguments: make demo ARGS="--seeds 5", make test ARGS="-k golden"

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo test check wheel clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[transformer-lens,nnsight,plots,dev]'
	touch $@

demo: .venv/installed
	$(BIN)/python examples/facts_in_an_mlp.py $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest $(ARGS)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

wheel:
	rm -rf build/bare
	$(PYTHON) -m venv build/bare
	build/bare/bin/pip install --quiet --disable-pip-version-check -c constraints.txt .
	cd build && bare/bin/python ../tests/bare_environment.py

clean:
	rm -rf .venv build dist out
