# make serve · cluster · test · bench · chaos · compare · peers · plan · notebooks · lint: each does its own set-up. PYTHON=python3.12 make serve picks another.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: serve cluster test test-slow bench chaos compare peers plan lint notebooks lessons

serve: $(VENV)/serve
	$(BIN)/uvicorn server:app

cluster: $(VENV)/serve
	$(BIN)/python -m deploy.cluster $(or $(N),2)

test: $(VENV)/dev
	$(BIN)/pytest --numprocesses=auto

test-slow: $(VENV)/dev
	$(BIN)/pytest -m slow

bench: $(VENV)/dev
	$(BIN)/python -m loadtests.bench
	$(BIN)/python -m loadtests.bench_model
	$(BIN)/python -m loadtests.bench_threads

chaos: $(VENV)/dev  # CHAOS_S=3600 for an hour, SEED=1 for another one
	$(BIN)/python -m loadtests.chaos $(if $(SEED),--seed $(SEED))

compare: $(VENV)/dev
	$(BIN)/python -m loadtests.compare

peers: $(VENV)/dev  # PEERS="litserve mosec" for some of them
	$(BIN)/python -m loadtests.peers $(if $(PEERS),--peers $(PEERS))

plan: $(VENV)/dev
	$(BIN)/python -m loadtests.$(if $(FLEET),fleet $(FLEET),planner $(PLAN))

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

notebooks: $(VENV)/lab
	$(BIN)/jupyter lab notebooks

lessons: $(VENV)/dev
	$(BIN)/python notebooks/run.py

$(VENV)/serve: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/serve
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/lab: requirements-lab.txt $(VENV)/dev
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-lab.txt
	touch $@
