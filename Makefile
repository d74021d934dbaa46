# Two commands: `make demo` installs and runs the main job, `make test` installs and passes the tests.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
SEEDS  ?= 1
# Threads are set on purpose: oversubscription costs 5 to 10 times.
export OMP_NUM_THREADS ?= 2
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export DO_NOT_TRACK = 1
export GX_ANALYTICS_ENABLED = false
export DVC_NO_ANALYTICS = 1

.PHONY: help setup demo test servers test-system lint types bench-learning bench-speed bench-latency bench-gate soak clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# uv resolves and links the pinned set in seconds; wheels that pip is told to look for first (a folder of CPU
# torch, say) are offered to it as well.
$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv -c constraints.txt
	UV_LINK_MODE=copy UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip install --quiet --python $(BIN)/python \
	  -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.installed  ## install everything into .venv (idempotent)

demo: setup  ## the main job: collect, learn, gate, deploy, improve while deployed; ends with runs/demo/report.html
	$(BIN)/lwd demo

test: setup lint types  ## all tests that need no server
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

servers: setup  ## prepare Kafka, Garage and PostgreSQL outside the clone, once (Garage is built: ten minutes)
	$(BIN)/lwd servers prepare

# CI's short form goes on where a server cannot be had: its tests are skipped, by name.
test-system: setup  ## every row of the fault matrix on real Kafka, Garage and PostgreSQL (SHORT=1: CI's short form)
	$(if $(SHORT),timeout 1500 )$(BIN)/lwd servers prepare$(if $(SHORT), || echo "NOT ALL SERVERS CAN BE HAD HERE")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests $(AGAIN) --durations=12 -m "system$(if $(SHORT), and not slow,)"

lint: setup
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy lwd_model infra data_contracts

bench-learning: setup  ## the full suite of eight tasks, resumable: docs/results/learning.json (SEEDS=3 for three seeds)
	$(BIN)/python -m bench.learning --seeds $(SEEDS)

bench-speed: setup  ## learner, simulator, reader and data plane speeds: docs/results/speed.json
	$(BIN)/python -m bench.speed

bench-latency: setup servers  ## latencies of episodes, policies and commits on real servers: docs/results/latency.json
	$(BIN)/python -m bench.latency

soak: setup servers  ## 30,000 episodes on real servers under injected faults: docs/results/soak.json (ACTORS=64: soak-64.json)
	$(BIN)/python -m bench.soak $(if $(ACTORS),--actors $(ACTORS))

bench-gate: setup  ## false promotion rate and power of the gate: docs/results/gate.json
	$(BIN)/python -m bench.gate

clean:  ## remove what demo and bench wrote (not the environment)
	rm -rf runs data models metrics plots .mypy_cache .ruff_cache .pytest_cache .hypothesis
