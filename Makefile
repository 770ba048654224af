# Everything a person repeats. Each target makes the virtual environment it needs; PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
DEEPSPEED := .venv-deepspeed
PIP := -m pip install -q --disable-pip-version-check
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export DO_NOT_TRACK = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test test-oldest test-slow test-distributed test-deepspeed test-peft test-peft-oldest test-all lint format clean

quickstart: $(VENV)/package  ## fine-tune the embedded base with SORSA, end to end
	$(VENV)/bin/sorsa quickstart $(ARGS)

test: $(VENV)/tests  ## the fast tests, on the latest versions
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow and not distributed" $(ARGS)

test-oldest: $(OLDEST)/tests  ## the same on the oldest supported versions
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m "not slow and not distributed" $(ARGS)

test-distributed: $(VENV)/tests  ## DDP and FSDP2 on two CPU processes
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "distributed and not deepspeed" $(ARGS)

test-deepspeed: $(DEEPSPEED)/tests  ## DeepSpeed ZeRO 1, 2 and 3 on two CPU processes
	OMP_NUM_THREADS=1 $(DEEPSPEED)/bin/python -m pytest -m deepspeed tests/distributed $(ARGS)

test-slow: $(VENV)/tests  ## the wheel in a clean environment, the quickstart, real pretrained weights
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m slow $(ARGS)

test-peft: $(VENV)/tests  ## PEFT's own test suite for SORSAConfig, on the latest versions
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/peft_conformance/run.py $(ARGS)

test-peft-oldest: $(OLDEST)/tests  ## the same on the oldest supported versions
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python tests/peft_conformance/run.py $(ARGS)

test-all: lint test test-oldest test-peft test-peft-oldest test-slow test-distributed test-deepspeed  ## what CI runs

lint: $(VENV)/tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/tests
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) $(DEEPSPEED) .peft_conformance build dist *.egg-info

$(VENV)/package: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -c constraints.txt -e ".[plot]"
	touch $@

$(VENV)/tests: $(VENV)/package tests/oracles.txt
	$(VENV)/bin/python $(PIP) -c constraints.txt -e ".[test,dev]"
	$(VENV)/bin/python $(PIP) --no-deps -r tests/oracles.txt
	touch $@

# DeepSpeed compiles a small gloo helper at its first start: once here, so that no test's time-out pays for it
$(DEEPSPEED)/tests: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python $(PIP) -c constraints.txt -e ".[test,deepspeed]"
	DS_ACCELERATOR=cpu $(DEEPSPEED)/bin/python -c \
	    "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load()"
	touch $@

$(OLDEST)/tests: pyproject.toml constraints-oldest.txt tests/oracles.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt -e ".[test]"
	$(OLDEST)/bin/python $(PIP) --no-deps -r tests/oracles.txt
	touch $@
