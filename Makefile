# `make findings` and `make test` do the whole job from a bare machine with Python 3.11 or later.
.DEFAULT_GOAL := help
.PHONY: help findings test check flow ui publish sync calibrate bench interrupt clean

PROFILE ?= laptop
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
WORKERS ?= 1
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
STAMP := $(VENV)/.installed
HOME_OF := $(if $(filter laptop,$(PROFILE)),.,flows/profiles/$(PROFILE))
PIPELINE := $(patsubst ./%,%,$(HOME_OF)/dvc.yaml)
REPORTS := $(if $(filter laptop,$(PROFILE)),reports,reports/$(PROFILE))
PARAMS := $(patsubst ./%,%,$(HOME_OF)/params.yaml)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Waiting threads sleep instead of spinning: several times faster where others use the machine too, no slower alone.
export OMP_WAIT_POLICY := passive

help: ## show this text
	@echo "make findings [PROFILE=laptop|smoke|evidence|gpu]   from nothing to reports/findings.html"
	@echo "make test                                           the test suite, end-to-end run included"
	@echo
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python found; install Python 3.11 or later, or give make PYTHON=/path/to/python"; exit 1; }
	@echo "installing into $(VENV) (some minutes the first time)"
# A creation that was killed half way leaves a Python without pip: begin again.
	@$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[pipeline,dev]' \
	  > $(VENV)/pip.log 2>&1 || { grep -v '^WARNING' $(VENV)/pip.log | tail -20; exit 1; }
	@touch $@

findings: $(STAMP) ## model, corpus, activations, trainings, evaluation, report (PROFILE=...)
	@test -f $(PIPELINE) || { echo "PROFILE=$(PROFILE) is unknown; choose laptop, smoke, evidence or gpu"; exit 2; }
	@python -m crosshead.params $(PARAMS)
	@dvc repro $(PIPELINE)
	@echo "findings: $(REPORTS)/findings.html"

test: $(STAMP) ## all tests
# Two processes of one thread each: most tests are too small for two threads. PYTEST_ARGS='-n 0' runs them in one.
	@OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: $(STAMP) ## formatting, lint, types, import contracts
	@ruff format --check src flows tests && ruff check . && basedpyright --level error && lint-imports

flow: $(STAMP) ## the whole profile as one Prefect flow (PROFILE=..., WORKERS=2 trainings at once)
	@python -m crosshead.params $(PARAMS)
	@python -m flows.findings --pipeline $(PIPELINE) --workers $(WORKERS)

ui: $(STAMP) ## Prefect and MLflow on 127.0.0.1
	@python -m flows.servers

publish: $(STAMP) ## refill MLflow from the reports (PROFILE=...)
	@python -m flows.publish --params $(PARAMS)

sync: $(STAMP) ## rewrite code dependencies in dvc.yaml and the profiles; drop lock entries and reports of runs that are gone
	@python -m flows.sync

calibrate: $(STAMP) ## measure dense and sparse prices here, write them into the parameters (PROFILE=laptop, evidence or gpu; retrains everything)
	@python -m flows.calibrate --params $(PARAMS)

bench: $(STAMP) ## time our steps beside the peers', needs the laptop profile's data (BENCH_ARGS=...)
	@dvc repro harvest
	@python -m benchmarks.run $(BENCH_ARGS)

interrupt: $(STAMP) ## kill `make findings` three times, compare with a run left alone (give PROFILE=smoke: others take hours)
	@python -m tests.flows.interrupt --profile $(PROFILE)

clean: ## remove what is not an output: unfinished work, viewers' stores
	@rm -rf work dvc_plots mlartifacts .prefect mlflow.db mlflow.db-journal
