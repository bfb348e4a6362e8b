# make train: set up and run the reference trainer.  make test: set up, lint, check types, run the tests.
# make check: lint, types, the fast tests in PyTorch.  make mutants: do the tests notice changed code?
# VENV=system uses the python on PATH and keeps the torch it has.
VENV ?= .venv
PYTHON ?= python3
CONFIG ?=
ARGS ?=
# Test processes
JOBS ?= 2
# What `make check` runs: files of at most about 15 s without the kernels, which the interpreter makes slow.
FAST := advantage_oracles derivatives diagnostics docs errors group_advantage grpo guards inplace \
	integrations_host integrations_masks integrations_miles integrations_nemo_rl integrations_openrlhf \
	integrations_packed integrations_padded integrations_slime layout linear_errors logprob loss metrics names \
	objective packaging policy_loss preset_edges preset_values presets public_api rare_options readme reference \
	scaling selection sequence_loss shapes tensor_kinds trainer_data trainer_models \
	trl_docs trl_loss verl verl_options weights

ifeq ($(VENV),system)
PY := $(PYTHON)
READY := system
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: setup system train test check mutants lint bench clean
setup: $(READY)

EXTRA := test
train: EXTRA := train
system:
	@$(PYTHON) tests/installed.py $(EXTRA)

# torch first and alone, at the pinned version: other packages would otherwise pull the newest CUDA build.
# verl last, for its sources alone, which tests/test_verl.py runs: its requirements exclude our transformers, and its
# wheel brings a top-level `tests`. Hence without dependencies, and off the path. So is Hugging Face's kernels, which
# loads our hub package in tests/test_hub.py: transformers changes its ways where it can be imported. And the older TRL
# that is supported, for tests/test_trl_versions.py.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"make needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}: set PYTHON to another")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch setuptools
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(VENV)/oracles verl kernels
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(VENV)/trl-1.15 trl==1.15.0
	touch $@

train: $(READY)
	$(PY) -m grpo_fast.trainer train $(CONFIG) $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: $(READY) lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) $(ARGS)

check: $(READY) lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) -k "not triton" $(FAST:%=tests/test_%.py) $(ARGS)

mutants: $(READY)
	$(PY) tests/mutants.py --jobs $(JOBS) $(ARGS)

bench: $(READY)
	$(PY) -m pytest benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
