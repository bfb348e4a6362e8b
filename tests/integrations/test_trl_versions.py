"""The older minor version of TRL: some of the other files' tests run with it, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_fast.integrations.trl import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]
# `make` puts it there: beside the environment's packages, off the path.
FOLDER = Path(sys.prefix) / f"trl-{SUPPORTED[0]}"

pytest.importorskip("trl", SUPPORTED[0], reason="its other version is tried")

# Stock and ours trained side by side, parameters within 1e-6, metrics alike; RLOO and DPO after `patch()`.
CASES = [
    "test_trl_trainer.py::test_off_policy_with_a_reference[dapo]",
    "test_trl_trainer.py::test_off_policy_with_a_reference[cispo]",
    "test_trl_trainer.py::test_off_policy_with_a_reference[vespo]",
    "test_trl_trainer.py::test_options[sequence]",
    "test_trl_trainer.py::test_options[entropy]",
    "test_trl_trainer.py::test_lora[kl]",
    "test_trl_trainer.py::test_trls_other_trainers[DPO-2]",
    "test_trl_dtypes.py::test_a_model_in_float64[RLOO]",
    "test_trl.py::TestObjective::test_defaults_are_those_of_trl",
    "test_trl_start.py::test_fused",
]


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no TRL {SUPPORTED[0]} in {FOLDER} (make setup)")
def test_the_older_version():
    arguments = [
        "-q",
        "--color=no",
        "-p",
        "no:cacheprovider",
        *(f"tests/integrations/{case}" for case in CASES),
    ]
    code = (
        "import sys, trl, pytest\n"
        f"assert trl.__version__.startswith('{SUPPORTED[0]}.'), trl.__version__\n"
        f"sys.exit(pytest.main({arguments}))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert f"\n{len(CASES)} passed" in run.stdout, run.stdout[-4000:]


def test_what_is_installed():
    """The extra has the range of the adapter, and `make` puts the older version where it is looked for."""
    at_least, below = SUPPORTED
    assert f'trl = ["trl>={at_least},<{below}", ' in (ROOT / "pyproject.toml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert f"--target $(VENV)/{FOLDER.name} trl=={at_least}.0\n" in makefile
