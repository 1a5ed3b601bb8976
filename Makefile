# `make` prints what there is; each does its own set-up. PYTHON=python3.12 make serve picks another.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports; to compile everything takes as long as to install it.
PIP := $(BIN)/pip install --disable-pip-version-check --no-compile

.PHONY: help serve chat cluster load test test-slow bench chaos compare peers plan docs lint learn lessons

help:  ## this list
	@awk -F ': .*## |:  ## ' '/^[a-z-]+:.*  ## /{printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

serve: $(VENV)/serve  ## serve the bundled model on http://127.0.0.1:8000, or the one that MODEL names
	$(BIN)/uvicorn server:app

chat: models/chat/config.json  ## serve a small chat model, SmolLM2-135M-Instruct, token by token
	TASK=text-generation MODEL=models/chat $(BIN)/uvicorn server:app

cluster: $(VENV)/serve  ## HAProxy and N=2 replicas of the same app
	$(BIN)/python -m deploy.cluster $(or $(N),2)

load: $(VENV)/dev  ## load test with Locust's page, http://127.0.0.1:8089; LOAD="--headless -t 30s OpenLoop" without it
	$(BIN)/python -m loadtests.load $(LOAD)

test: $(VENV)/dev  ## the tests, in a few minutes
	$(BIN)/pytest --numprocesses=auto

test-slow: $(VENV)/dev  ## the lessons, small comparisons, every task in every mode, a cluster
	$(BIN)/pytest -m slow --numprocesses=2

bench: $(VENV)/dev models/chat/config.json  ## measure the overhead of the server: many minutes, two idle cores; BENCH=--quick shortens it
	$(BIN)/python -m loadtests.bench $(BENCH)
	$(BIN)/python -m loadtests.bench.model $(BENCH)
	$(BIN)/python -m loadtests.bench.threads $(BENCH)
	$(BIN)/python -m loadtests.bench.scaling $(BENCH)
	$(BIN)/python -m loadtests.bench.preparing $(BENCH)
	$(BIN)/python -m loadtests.bench.generation $(BENCH)

chaos: $(VENV)/dev models/chat/config.json  ## fault injection around the real server; CHAOS_S=3600 for an hour, SEED=1 for another one
	$(BIN)/python -m loadtests.chaos $(if $(SEED),--seed $(SEED))
	$(BIN)/python -m loadtests.chaos.texts $(if $(SEED),--seed $(SEED))

compare: $(VENV)/dev models/chat/config.json  ## every deployment mode through the same scenarios, most of an hour; COMPARE="--quick --modes thread sync-2"
	$(BIN)/python -m loadtests.compare $(COMPARE)
	$(if $(COMPARE),,$(BIN)/python -m loadtests.compare.generation)

peers: $(VENV)/dev models/chat/config.json  ## compare with other servers; PEERS="litserve mosec" for some
	$(BIN)/python -m loadtests.peers $(if $(PEERS),--peers $(PEERS))
	$(if $(PEERS),,$(BIN)/python -m loadtests.peers.generation)

plan: $(VENV)/dev  ## does batching pay here? FLEET="--rate 5000 --replica-ms 10+0.5n": how many replicas?
	$(BIN)/python -m loadtests.plan$(if $(FLEET),.replicas $(FLEET), $(PLAN))

docs: $(VENV)/dev  ## write the tables of docs/ from the code
	$(BIN)/python -m docs.generate

lint: $(VENV)/dev  ## style, types, who imports whom, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

learn: $(VENV)/lab  ## the lessons in JupyterLab, for you to guess and run; LESSON=3 for one
	$(BIN)/python notebooks/learn.py $(LESSON)

lessons: $(VENV)/dev  ## run the lessons, and store what they show; LESSON=1 for one
	$(BIN)/python notebooks/run.py $(LESSON)

$(VENV)/serve: requirements.txt
	@echo "Installing what serving needs. PyTorch is large: this takes minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

models/chat/config.json: requirements-chat.txt | $(VENV)/serve
	$(PIP) --quiet -r requirements-chat.txt
	$(BIN)/python models/chat.py
	touch $@

$(VENV)/dev: requirements-dev.txt requirements-optional.txt $(VENV)/serve
	$(PIP) -r requirements-dev.txt
	touch $@

$(VENV)/lab: requirements-lab.txt $(VENV)/dev
	$(PIP) -r requirements-lab.txt
	touch $@
