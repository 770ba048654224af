# Everything a person repeats. Each target makes the virtual environment it needs; PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
DISTRIBUTED := .venv-distributed
AXOLOTL := .venv-axolotl
LLAMAFACTORY := .venv-llamafactory
CANARY := .venv-canary
DOCS := .venv-docs
SHARED := -n 2 --dist loadfile --no-loadscope-reorder# a file's tests share what they made
FAST := -m "not slow and not distributed and not axolotl and not hosts" $(SHARED)
BENCHMARKS := layer_step model_step scaling initialisation regularizer_share adapter_files folding import_time
COMPAT := tests/compat -m "not slow and not distributed and not axolotl and not hosts"
SHOWN := tests/layers/kinds tests/layers/test_layer.py tests/tuner tests/tools/test_export_of_kinds.py tests/test_config.py \
	$(addprefix tests/promises/test_,adapter_options.py architectures.py base_model_untouched.py bit_equal_start.py \
	compile.py failed_attempts.py loading_and_generating.py peft_integration.py)
RESULTS := runs/support
GLOO_HELPER := -c "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load()"
AXOLOTL_BUILT := $(CURDIR)/$(AXOLOTL)/built# what DeepSpeed compiles, apart from the other environment's
PIP := -m pip install -q --disable-pip-version-check
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export DO_NOT_TRACK = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test test-oldest test-slow test-distributed test-peft test-peft-oldest test-axolotl test-hosts test-llamafactory test-all \
	support-table bench bench-distributed bench-quantization canary docs lint format clean

quickstart: $(VENV)/package  ## fine-tune the embedded base with SORSA, end to end
	$(VENV)/bin/sorsa quickstart $(ARGS)

test: $(VENV)/tests  ## the fast tests, on the latest versions
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(FAST) $(ARGS)

test-oldest: $(OLDEST)/tests  ## the same on the oldest supported versions
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(FAST) $(ARGS)

test-distributed: $(DISTRIBUTED)/tests  ## DDP, FSDP2 and DeepSpeed on two CPU processes
	OMP_NUM_THREADS=1 $(DISTRIBUTED)/bin/python -m pytest -m "distributed and not axolotl" $(ARGS)

test-slow: $(VENV)/tests  ## the wheel in a clean environment, the quickstart, real pretrained weights
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "slow and not axolotl" $(SHARED) $(ARGS)

test-peft: $(VENV)/tests  ## PEFT's own test suite for SORSAConfig, on the latest versions
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/peft_conformance/run.py -n 2 $(ARGS)

test-peft-oldest: $(OLDEST)/tests  ## the same on the oldest supported versions
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python tests/peft_conformance/run.py -n 2 $(ARGS)

support-table: $(VENV)/tests $(OLDEST)/tests  ## docs/support.md from the results of tests; failures are written there
	mkdir -p $(RESULTS)
	-OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(SHOWN) --junit-xml=$(CURDIR)/$(RESULTS)/own.xml
	-OMP_NUM_THREADS=1 $(VENV)/bin/python tests/peft_conformance/run.py --junit-xml=$(CURDIR)/$(RESULTS)/peft.xml
	-OMP_NUM_THREADS=1 $(OLDEST)/bin/python tests/peft_conformance/run.py --junit-xml=$(CURDIR)/$(RESULTS)/oldest.xml
	-OMP_NUM_THREADS=1 $(VENV)/bin/python tests/peft_conformance/run.py --borrowed --junit-xml=$(CURDIR)/$(RESULTS)/lora.xml
	PYTHONPATH=tests $(VENV)/bin/python tests/promises/support_table.py $(addprefix $(RESULTS)/,own.xml peft.xml oldest.xml lora.xml) > $(RESULTS)/support.md
	mv $(RESULTS)/support.md docs/support.md

test-axolotl: $(AXOLOTL)/tests  ## the real axolotl commands, in an environment of their own (4 GB)
	OMP_NUM_THREADS=1 AXOLOTL_DO_NOT_TRACK=1 TORCH_EXTENSIONS_DIR=$(AXOLOTL_BUILT) \
	    $(AXOLOTL)/bin/python -m pytest -m axolotl tests/with_axolotl tests/promises/test_api_surface.py $(SHARED) $(ARGS)

test-hosts: test-llamafactory  ## other hosts, each in an environment of its own

test-llamafactory: $(LLAMAFACTORY)/tests  ## the real llamafactory-cli
	OMP_NUM_THREADS=1 $(LLAMAFACTORY)/bin/python -m pytest tests/with_llamafactory $(ARGS)

canary: $(CANARY)/tests  ## the newest releases, pre-releases too: within the supported ranges, then above them
	$(CANARY)/bin/python $(PIP) --pre --upgrade --no-deps $(shell $(PYTHON) tests/compat/ranges.py)
	$(CANARY)/bin/sorsa doctor
	OMP_NUM_THREADS=1 $(CANARY)/bin/python -m pytest $(COMPAT)
	$(CANARY)/bin/sorsa quickstart --steps 2
	$(CANARY)/bin/python $(PIP) --pre --upgrade --no-deps $(shell $(PYTHON) tests/compat/ranges.py --above)
	-$(CANARY)/bin/sorsa doctor
	@OMP_NUM_THREADS=1 $(CANARY)/bin/python -m pytest $(COMPAT) && $(CANARY)/bin/sorsa quickstart --steps 2 \
	    && echo "The newest releases above the supported ranges work too." \
	    || echo "The newest releases above the supported ranges do not work yet; what is above says where."
	rm $(CANARY)/tests

test-all: lint docs test test-oldest test-peft test-peft-oldest test-slow test-distributed test-axolotl test-hosts  ## what CI runs

bench: $(VENV)/bench  ## every cost beside its peers, into benchmarks/results and docs; on a GPU if there is one
	set -e; for name in $(BENCHMARKS); do $(VENV)/bin/python benchmarks/$$name.py $(ARGS); done
	$(VENV)/bin/python benchmarks/report.py

bench-distributed: $(DISTRIBUTED)/tests  ## what every engine sends and holds, and new adapters on several processes
	PATH="$(CURDIR)/$(DISTRIBUTED)/bin:$$PATH" python benchmarks/distributed_costs.py
	PATH="$(CURDIR)/$(DISTRIBUTED)/bin:$$PATH" python benchmarks/initialisation_ranks.py $(ARGS)
	PATH="$(CURDIR)/$(DISTRIBUTED)/bin:$$PATH" python benchmarks/report.py

bench-quantization: $(VENV)/tests  ## quantised bases beside QLoRA, LoftQ and QPiSSA; takes long
	set -e; for name in quantization quantization_step quantization_training; do \
	    $(VENV)/bin/python benchmarks/$$name.py; done
	$(VENV)/bin/python benchmarks/report.py

docs: $(DOCS)/site  ## the documentation site, into runs/site; a warning or a dead link is an error
	$(DOCS)/bin/mkdocs build -q

lint: $(VENV)/tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/tests
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) $(DISTRIBUTED) $(AXOLOTL) $(LLAMAFACTORY) $(CANARY) $(DOCS) .peft_conformance build dist *.egg-info

$(VENV)/package: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -c constraints.txt -e ".[plot]"
	touch $@

$(VENV)/tests: $(VENV)/package tests/oracles.txt
	$(VENV)/bin/python $(PIP) -c constraints.txt -e ".[test,dev]"
	$(VENV)/bin/python $(PIP) --no-deps -r tests/oracles.txt
	touch $@

$(VENV)/bench: $(VENV)/package tests/oracles.txt
	$(VENV)/bin/python $(PIP) --no-deps -r tests/oracles.txt
	touch $@

# DeepSpeed compiles a small gloo helper at its first start: once here, so that no test's time-out pays for it
$(DISTRIBUTED)/tests: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DISTRIBUTED)
	$(DISTRIBUTED)/bin/python $(PIP) -c constraints.txt -e ".[test,deepspeed]"
	DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(DISTRIBUTED)/bin:$$PATH" python $(GLOO_HELPER)
	touch $@

$(OLDEST)/tests: pyproject.toml constraints-oldest.txt tests/oracles.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt -e ".[test]"
	$(OLDEST)/bin/python $(PIP) --no-deps -r tests/oracles.txt
	touch $@

$(AXOLOTL)/tests: pyproject.toml constraints-axolotl.txt
	$(PYTHON) -m venv $(AXOLOTL)
	$(AXOLOTL)/bin/python $(PIP) -c constraints-axolotl.txt -e ".[axolotl,deepspeed]" pytest pytest-xdist
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(AXOLOTL_BUILT) PATH="$(CURDIR)/$(AXOLOTL)/bin:$$PATH" python $(GLOO_HELPER)
	touch $@

# torchaudio's compiled part is built for CUDA; LLaMA-Factory imports the package for any task, and only audio calls that
$(LLAMAFACTORY)/tests: pyproject.toml constraints-llamafactory.txt
	$(PYTHON) -m venv $(LLAMAFACTORY)
	$(LLAMAFACTORY)/bin/python $(PIP) -c constraints-llamafactory.txt -e . trl omegaconf pytest
	$(LLAMAFACTORY)/bin/python $(PIP) --no-deps llamafactory==0.9.5 torchaudio==2.8.0
	rm -f $(LLAMAFACTORY)/lib/python3.*/site-packages/torchaudio/lib/*.so
	touch $@

$(DOCS)/site: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python $(PIP) -r docs/requirements.txt
	touch $@

# torch stays what is tested; everything else is the newest that the ranges in pyproject.toml take
$(CANARY)/tests: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CANARY)
	grep '^torch==' constraints.txt > $(CANARY)/torch.txt
	$(CANARY)/bin/python $(PIP) -c $(CANARY)/torch.txt --upgrade -e ".[test]"
	touch $@
