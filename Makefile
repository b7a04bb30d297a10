PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test lint clean

# Threads that wait for one another spin a little where nothing else runs, which saves a seventh of the time; beside other
# work they must not.
WAITING = $(shell awk '{ print ($$1 < 1) ? "GOMP_SPINCOUNT=2000" : "OMP_WAIT_POLICY=PASSIVE" }' /proc/loadavg 2>/dev/null || echo OMP_WAIT_POLICY=PASSIVE)

quickstart: .venv/ready
	$(WAITING) $(BIN)/stepwise run quickstart
	$(BIN)/stepwise report runs/quickstart

test: .venv/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first and by exact version: a later line can then not pull another build of it.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
