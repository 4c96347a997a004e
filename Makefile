# The two commands of the README, and what they are made of. Everything happens in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread: part of what makes runs repeatable, and the fastest setting for networks of this size.
export OMP_NUM_THREADS ?= 1

.PHONY: test check lint types unit slow extras fuzz demo team docs protos clean

test check: lint types unit  ## what CI runs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(READY)
	$(BIN)/mypy

unit: $(READY)  ## those of serving, which measure time, one after another
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --ignore tests/serve --ignore tests/client
	$(BIN)/pytest tests/serve tests/client

slow: $(READY)  ## tests that CI leaves out: other maps of SMAX are compiled, Ray and SLURM jobs are killed
	$(BIN)/pytest -m slow

extras: $(READY)  ## each extra alone in an environment of its own, and whether its packages fit together
	$(BIN)/python -m tests.support.extras_alone

fuzz: $(READY)  ## 100,000 hostile requests; 2,000 of them are part of the tests
	$(BIN)/python -m tests.support.fuzz

# Collect, train, export, serve, evaluate. QUICK=1 takes the same path in about a minute of CPU time.
demo: $(READY)
	$(BIN)/omcda-deploy demo --out demo $(if $(QUICK),--quick)

team: $(READY)  ## train, measure and write the team of  serve --demo,  its page and the README's picture
	$(BIN)/omcda-deploy results docs/results/demo.toml --out results/demo
	$(BIN)/python docs/generate_team.py results/demo

docs: $(READY)  ## build the pages as a site in site/; a broken link fails, also in the tests
	$(BIN)/python docs/generate_observations.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build  # with --quiet, warnings would not fail

protos: $(READY)  ## regenerate the committed protobuf code
	$(BIN)/python -m omcda_deploy.protos.generate

# torch first and by name: a resolver that is free to choose takes a build with several gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo site
