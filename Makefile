# jaxmem: `make demo` and `make test` need nothing but Python 3.11 or newer;
# each creates .venv, installs what it needs once, and runs.
#
# On an accelerator: make demo REQUIREMENTS=requirements-cuda.txt (or -tpu).

PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed-$(basename $(notdir $(REQUIREMENTS)))
DEV_STAMP := $(VENV)/installed-dev
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
  $(RUN) -m pip install --quiet

.PHONY: help demo test lint format shipped clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | \
	  awk -F '\t' '{printf "make %-9s %s\n", $$1, $$2}'

demo: $(STAMP)  ## run the methods on the embedded model: a table and plots
	$(RUN) -m experiments.demo $(ARGS)

test: $(DEV_STAMP) lint  ## lint, then all tests (ARGS="-k bank" for some)
	$(RUN) -m pytest -n logical --maxprocesses=4 --dist=loadfile $(ARGS)

lint: $(DEV_STAMP)  ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(DEV_STAMP)  ## let ruff rewrite what lint would complain about
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Every weight in the repository, from nothing; a second call resumes. Of CMT and
# MAC the seed that answers best from a whole bank (docs/cmt.md), else the first.
shipped: $(STAMP)  ## retrain every shipped weight (CPU or accelerator)
	for model in nano tiny; do \
	  $(RUN) -m experiments.pretrain --config=configs/pretrain.py:$$model \
	    --workdir=out/shipped/$$model --config.export=jaxmem/models/$$model \
	    $(ARGS) || exit 1; \
	done
	for run in cmt,2 mac,2 mbc,0; do \
	  method=$${run%,*}; \
	  $(RUN) -m experiments.cmt --config=configs/cmt.py:tiny \
	    --workdir=out/shipped/$$method --config.method=$$method \
	    --config.seed=$${run#*,} \
	    --config.export=jaxmem/methods/weights/$$method \
	    --config.export_dtype=bfloat16 $(ARGS) || exit 1; \
	done
	$(RUN) -m experiments.mplus --config=configs/mplus.py:tiny \
	  --workdir=out/shipped/mplus --config.export=jaxmem/methods/weights/mplus \
	  --config.export_dtype=bfloat16 $(ARGS)

clean:  ## remove .venv and caches, keep out/
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing `venv` installs: without it the folder is half made.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit( \
	  None if v >= (3, 11) else "jaxmem needs Python 3.11 or newer, and %s is \
	%d.%d: give another one, as in make test PYTHON=python3.12" \
	  % (sys.executable, v[0], v[1]))'
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(REQUIREMENTS) requirements.txt | $(VENV)/bin/pip
	@echo "installing $(REQUIREMENTS) into $(VENV) (once, a few minutes)"
	$(PIP) -r $(REQUIREMENTS)
	@touch $@

$(DEV_STAMP): requirements-dev.txt requirements.txt | $(VENV)/bin/pip
	@echo "installing requirements-dev.txt into $(VENV) (once, a few minutes)"
	$(PIP) -r requirements-dev.txt
	@touch $@
