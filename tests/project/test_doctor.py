"""`grpo-fast doctor`: its report, its self-check, the bad combinations, and its exit status."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath
from types import ModuleType, SimpleNamespace

import pytest
import tomllib
import torch

from grpo_fast import grpo_loss, reference
from grpo_fast.doctor import check, combinations, command, machine, paths
from grpo_fast.doctor.combinations import COMBINATIONS, OF_BENCHMARKS, diagnose
from grpo_fast.doctor.machine import RANGES, Gpu, Machine
from grpo_fast.integrations.shared.packages import is_between
from grpo_fast.notices import VARIABLES, FallbackError
from grpo_fast.trainer import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "doctor.md").read_text()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report():
    """The whole report about this machine, on the PyTorch path."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GRPO_FAST_BACKEND", "torch")
    patch.delenv("TRITON_INTERPRET", raising=False)
    patch.setattr(check, "LONG", 2500)  # long rows say nothing more of PyTorch's operators
    yield command.report("cpu", 60)
    patch.undo()


def test_every_operator_is_right_on_this_machine(report):
    assert report["right"]
    names = {x["name"].partition(",")[0] for x in report["check"]}
    assert names >= {"logprob", "grpo_loss", "policy_loss", "linear_logprob", "linear_grpo_loss"}
    assert names >= {"group_advantage"}
    for x in report["check"]:
        assert x["right"], x
        assert 0 <= x["share"] <= 1
    kinds = {x["dtype"] for x in report["check"]}
    assert kinds == {"float32", "bfloat16"}
    assert any(x["detail"].startswith("dlogits:") for x in report["check"]), "gradients count"
    assert "linear_grpo_loss, bias, LoRA, soft cap" in {x["name"] for x in report["check"]}


def test_every_operator_has_a_path_with_its_reason(report):
    found = {x["operator"]: x for x in report["paths"]}
    operators = {"logprob", "grpo", "policy_loss", "sequence_loss", "group_advantage", "scaling"}
    operators |= {"linear_logprob", "linear_grpo"}
    assert found.keys() == operators | {"chunks of a head", "shared prompts"}
    for name in operators:
        assert "PyTorch path (GRPO_FAST_BACKEND=torch)" in found[name]["ran"]
        assert found[name]["compiled"] == "no, eager"
        assert found[name]["fallbacks"] == []
    assert "chunks of 512 tokens: 16 (8192 tokens, " in found["chunks of a head"]["ran"]


def test_the_text_has_it_all(report):
    text = command.text(report)
    for x in report["check"]:
        assert f"{x['name']}, {x['dtype']}" in text
    assert f"torch {torch.__version__}" in text
    assert "GRPO_FAST_BACKEND=torch (forces" in text
    assert text.endswith("\nall is right")
    assert max(map(len, text.splitlines())) <= 110


def test_json_and_exit_status(report, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "report", lambda *_: report)
    path = tmp_path / "doctor.json"
    assert command.main(["--json", str(path)]) == 0
    assert json.loads(path.read_text()) == report
    monkeypatch.setattr(command, "report", lambda *_: report | {"right": False})
    assert command.main([]) == 1
    assert "NOT RIGHT" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--json", "no/such/folder/x.json"], "no such folder"),
        (["--json", str(ROOT)], f"--json {ROOT}: Is a directory"),
        (["--seconds", "0"], "want a positive number"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "sees no GPU")]),
    ],
)
def test_wrong_arguments(arguments, message, capsys, monkeypatch):
    """They are found before the work."""
    monkeypatch.setattr(command, "report", None)
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def a_case(ours):
    """Log-probs of a wrong or right operator."""

    def values(function):
        def compute(leaves):
            logp = function(leaves["logits"], torch.tensor([[1, 2]]))
            return {"loss": logp.sum()}

        return compute

    logits = torch.randn(1, 2, 9, dtype=torch.float64)
    return check.Case("mine", {"logits": logits}, {}, values(ours), values(reference.logprob))


@pytest.mark.parametrize(
    "ours, right, words",
    [
        (reference.logprob, True, ""),
        (lambda x, ids: 1.001 * reference.logprob(x, ids), False, "error"),
        (lambda x, ids: reference.logprob(x.detach(), ids) + 0 * x.sum(), False, "dlogits: error"),
        (lambda x, ids: reference.logprob(x, ids) * torch.nan, False, "not finite"),
        (lambda x, ids: 1 / 0, False, "ZeroDivisionError"),
    ],
)
def test_the_check_finds_wrong_values_and_gradients(ours, right, words):
    found = check.run(a_case(ours), torch.float32, CPU)
    assert found.right is right
    assert words in found.detail


def scaled(part):
    """`grpo_loss` with a part of its result, or its gradient, times 1.5."""

    def call(*arguments, **options):
        out = grpo_loss(*arguments, **options)
        kind, _, name = part.rpartition(" ")
        if kind == "metric":
            return out._replace(metrics=out.metrics | {name: 1.5 * out.metrics[name]})
        if part == "gradient":
            return out._replace(loss=1.5 * out.loss - 0.5 * out.loss.detach())
        return out._replace(**{part: 1.5 * getattr(out, part)})

    return call


@pytest.mark.parametrize(
    "part", ["loss", "logps", "entropy", "gradient", *(f"metric {x}" for x in check.METRICS)]
)
def test_the_check_compares_all_that_a_loss_returns(part, monkeypatch):
    monkeypatch.setattr(check, "grpo_loss", scaled(part))
    assert check.run(next(check._of_grpo_loss(11)), torch.float32, CPU).right is False


@pytest.mark.parametrize(
    "name, option, neutral",
    [
        ("grpo_loss", "temperature", 1.0),
        ("linear_grpo_loss", "softcap", None),
        ("linear_grpo_loss", "bias", None),
        ("linear_grpo_loss", "lora", None),
        ("linear_grpo_loss", "logit_scale", 1.0),
        ("linear_grpo_loss", "temperature", 1.0),
    ],
)
def test_the_check_notices_an_option_without_effect(name, option, neutral, monkeypatch):
    function = getattr(check, name)

    def deaf(*arguments, **options):
        return function(*arguments, **options | {option: neutral})

    monkeypatch.setattr(check, name, deaf)
    makers = {"grpo_loss": check._of_grpo_loss, "linear_grpo_loss": check._of_hidden_states}
    last = {"grpo_loss": "temperature 0.7", "linear_grpo_loss": "bias, LoRA, soft cap"}[name]
    (case,) = (x for x in makers[name](11) if last in x.name)
    found = check.run(case, torch.float32, CPU)
    assert found.right is False
    assert "error" in found.detail or "Error" in found.detail


def test_kernels_are_interpreted_on_any_device(monkeypatch):
    """The cases are then small, and have no bfloat16."""
    asked = []
    monkeypatch.setattr(check, "cases", lambda interpreted, _: asked.append(interpreted) or ())
    monkeypatch.setattr(check, "path_of", lambda x: SimpleNamespace(kernels=True))
    for value in ("1", "0"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        check.check(torch.device("meta"))  # as cuda, which is not here
    assert asked == [True, False]


def test_few_long_rows_are_checked_where_they_are_compiled():
    names = [[x.name for x in check.cases(compiled=way)] for way in (False, True)]
    assert names[1] == names[0][:-3]
    assert [name.split(", V")[0] for name in names[1][-2:]] == ["logprob", "grpo_loss, token"]


def test_a_wrong_switch_for_compiled_code_is_reported(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_COMPILE", "yes")
    found = command.report("cpu", None)
    assert found["compiled_on_a_cpu"] == "nothing (GRPO_FAST_COMPILE='yes': want 0 or 1)"
    assert [x["name"] for x in found["combinations"]] == ["wrong-value"]


def test_a_switch_that_forbids_every_call_is_reported(monkeypatch):
    """The operators raise, and the doctor goes on."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "cuda")
    monkeypatch.setattr(check, "SHORT", 11)
    monkeypatch.setattr(check, "LONG", 11)
    found = command.report("cpu", 5)
    assert not found["right"]
    assert found["combinations"][0]["name"] == "wrong-value"
    ran = [x for x in found["check"] if not x["name"].startswith("shared prompts")]
    assert {x["right"] for x in ran} == {False}
    text = command.text(found)
    assert (
        "WRONG -    logprob, V = 11, float32\n        ValueError: GRPO_FAST_BACKEND='cuda': "
        in text
    )
    assert "grpo: FAILED: ValueError: GRPO_FAST_BACKEND='cuda': want triton or torch" in text
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_check_stops_in_time(monkeypatch):
    found = check.check(CPU, seconds=0.0)
    assert {x.right for x in found} == {None}
    shown = {"right": True, "check": [x._asdict() for x in found]}
    assert (
        command._verdict(shown) == f"nothing wrong was found, but {len(found)} checks did not run"
    )


def test_an_operator_that_fails_decides_the_exit_status(monkeypatch):
    """Even without memory for its tensors, and the others are called."""
    monkeypatch.setattr(machine, "examine", lambda: Machine(versions=GOOD))

    def full(self, *shape, dtype=None):
        raise torch.OutOfMemoryError("no memory\nleft")

    calls = {name: paths.CALLS[name] for name in ("grpo", "linear_grpo")}
    monkeypatch.setattr(paths, "CALLS", calls | {"fine": lambda _: paths._chunks(CPU, torch.half)})
    monkeypatch.setattr(paths._Given, "new", full)
    monkeypatch.setattr(paths, "_shared", paths.notices.logged("shared")(lambda _: None))
    found = command.report("cpu", None)
    errors = {x["operator"]: x["error"] for x in found["paths"]}
    message = "OutOfMemoryError: no memory left"
    assert errors == {"grpo": message, "linear_grpo": message} | dict.fromkeys(
        ("fine", "chunks of a head", "shared prompts"), ""
    )
    assert not found["right"]
    assert f"\n  grpo: FAILED: {message}\n" in command.text(found)
    assert command.text(found).endswith("NOT RIGHT: see above")


def test_gpus_that_raise(monkeypatch):
    def properties(i):
        raise RuntimeError("CUDA error:\nunknown")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert machine.gpus() == ((), "RuntimeError: CUDA error: unknown")


def test_the_file_of_the_driver(monkeypatch, tmp_path):
    for path, want in ((tmp_path, "of an unknown version (Is a directory)"), (tmp_path / "x", "")):
        monkeypatch.setattr(machine, "DRIVER", path)
        assert machine.driver() == want
    for text, want in (("", "of an unknown version"), ("NVRM 580\nGCC\n", "NVRM 580")):
        (tmp_path / "x").write_text(text)
        assert machine.driver() == want


def test_no_driver_is_not_said_beside_a_gpu():
    here = Machine(**LINUX | {"driver": ""})
    assert command._driver(here).startswith("unknown")
    assert command._driver(Machine(**LINUX)) == "580"
    assert command._driver(Machine(versions=GOOD)) == "no NVIDIA driver"


def test_triton_says_its_version_itself(monkeypatch):
    """Its distribution may be pytorch-triton-rocm."""
    triton = SimpleNamespace(__version__="3.5.1+rocm", __spec__=object())
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(machine, "found_version", lambda name: None)
    assert machine.version_of("triton") == "3.5.1+rocm"


def test_a_checkout_is_not_called_missing(monkeypatch, tmp_path):
    for name in ("verl", "liger_kernel"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "openrlhf").mkdir()  # a folder of data
    monkeypatch.syspath_prepend(tmp_path)
    found = machine.checkouts(["verl", "liger-kernel", "openrlhf", "deepspeed_"])
    assert found == {"verl": str(tmp_path / "verl"), "liger-kernel": str(tmp_path / "liger_kernel")}
    assert "not installed" in command._package("verl", None)
    assert command._package("verl", None, "here").startswith("of an unknown version, from here (")


def test_a_package_that_hides_kernels(monkeypatch, tmp_path):
    """Only where Hugging Face's is installed, and another one is found."""
    theirs = SimpleNamespace(
        files=[PurePosixPath("kernels/__init__.py")], locate_file=lambda x: tmp_path / x
    )
    monkeypatch.setattr(machine.importlib.metadata, "distribution", lambda name: theirs)
    for origin, want in ((str(tmp_path / "kernels/__init__.py"), ""), ("other.py", "other.py")):
        monkeypatch.setattr(machine, "origin_of", lambda name, origin=origin: origin)
        assert machine.shadow() == want
    theirs.files = [PurePosixPath("__editable__.kernels.pth")]
    assert machine.shadow() == ""

    def missing(name):
        raise machine.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(machine.importlib.metadata, "distribution", missing)
    assert machine.shadow() == ""


def test_a_module_without_a_specification(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", ModuleType("kernels"))
    assert machine.origin_of("kernels") == ""


def test_the_compiler_is_the_one_that_triton_calls(monkeypatch):
    """An empty CC counts."""
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/bin/{name}" if name else None)
    for value, want in (("", ""), ("icx", "/bin/icx"), (None, "/bin/gcc")):
        monkeypatch.delenv("CC", raising=False)
        if value is not None:
            monkeypatch.setenv("CC", value)
        assert machine.compiler() == want


H200 = Gpu("H200", (9, 0), 141 << 30)
GOOD = {"torch": "2.13.0", "einops": "0.8.2", "triton": "3.7.1", "numpy": "2.4.1"}
LINUX = {"versions": GOOD, "build": "CUDA 12.8", "gpus": (H200,), "driver": "580"}
# Of each name, what makes a good machine a bad one.
BAD = {
    "wrong-value": {"variables": {"GRPO_FAST_BACKEND": "cuda"}},
    "unknown-variable": {"variables": {"GRPO_FAST_STRIKT": "1"}},
    "forced-kernels-without-triton": {
        "versions": GOOD | {"triton": None},
        "gpus": (),
        "driver": "",
        "variables": {"GRPO_FAST_BACKEND": "triton"},
    },
    "forced-kernels-on-a-cpu": {
        "gpus": (),
        "driver": "",
        "variables": {"GRPO_FAST_BACKEND": "triton"},
    },
    "interpreter-with-numpy": {
        "versions": GOOD | {"triton": "3.6.0"},
        "gpus": (),
        "driver": "",
        "variables": {"TRITON_INTERPRET": "1"},
    },
    "no-compiler": {"compiler": ""},
    "gpu-fails": {"gpus": (), "gpu_error": "RuntimeError: unknown"},
    "interpreter-on-a-gpu": {"compiler": "", "variables": {"TRITON_INTERPRET": "1"}},
    "cpu-torch-on-a-gpu-machine": {"gpus": (), "build": "CPU"},
    "gpu-not-seen": {"gpus": (), "variables": {"CUDA_VISIBLE_DEVICES": ""}},
    "gpu-without-triton": {"versions": GOOD | {"triton": None}},
    "old-triton": {"versions": GOOD | {"triton": "3.3.1"}},
    "old-gpu": {"gpus": (Gpu("T4", (7, 5), 16 << 30),)},
    "float32-copies": {"build": "ROCm 6.4", "versions": GOOD | {"torch": "2.9.1"}},
    "sums-in-two-steps": {"versions": GOOD | {"torch": "2.9.1"}},
    "old-einops": {"versions": GOOD | {"einops": "0.5.0"}},
    "old-transformers": {"versions": GOOD | {"transformers": "5.16.2"}},
    "other-trl": {"versions": GOOD | {"trl": "1.17.0"}},
    "other-verl": {"versions": GOOD | {"verl": "0.9.0"}},
    "other-openrlhf": {"versions": GOOD | {"openrlhf": "0.11.0"}},
    "other-nemo-rl": {"versions": GOOD | {"nemo_rl": "0.9.0"}},
    "other-accelerate": {"versions": GOOD | {"accelerate": "0.34.0"}},
    "other-kernels-package": {"shadow": "/site-packages/kernels/__init__.py"},
}


def test_each_bad_combination_is_found_by_its_name():
    assert list(BAD) == [x.name for x in COMBINATIONS]
    assert diagnose(Machine(**LINUX)) == []
    for name, change in BAD.items():
        assert [x.name for x in diagnose(Machine(**LINUX | change))] == [name]


def test_every_supported_range_has_a_combination():
    """What the report calls NOT SUPPORTED is found by name."""
    for name, (at_least, _) in RANGES.items():
        if at_least is not None and name != "torch":  # an older torch ends the command
            found = diagnose(Machine(**LINUX | {"versions": GOOD | {name: "0.0.1"}}))
            assert any(x.found == f"{name} 0.0.1" for x in found), name


@pytest.mark.parametrize(
    "change, words",
    [
        (BAD["gpu-not-seen"], "sees no GPU: CUDA_VISIBLE_DEVICES='' hides them all"),
        ({"gpus": (), "variables": {"CUDA_VISIBLE_DEVICES": "3"}}, "CUDA_VISIBLE_DEVICES='3'"),
        ({"gpus": ()}, "PyTorch for CUDA 12.8 sees no GPU"),
        ({"compiler": ""}, "no gcc or clang on the PATH"),
        ({"compiler": "", "variables": {"CC": ""}}, "CC='' is no program"),
    ],
)
def test_the_cause_is_named(change, words):
    (found,) = diagnose(Machine(**LINUX | change))
    assert found.found.endswith(words)


@pytest.mark.parametrize(
    "change",
    [
        {"gpus": (), "driver": "", "build": "CPU", "versions": GOOD | {"triton": None}},
        {"variables": {"GRPO_FAST_BACKEND": "torch"}, "compiler": ""},
        {"variables": {"GRPO_FAST_COMMIT": "abc", "GRPO_FAST_STRICT": "1"}},
        {"versions": GOOD | {"trl": "1.16.0", "transformers": "5.24.0", "verl": "0.9.1"}},
        {
            "gpus": (),
            "driver": "",
            "variables": {"GRPO_FAST_BACKEND": "triton", "TRITON_INTERPRET": "1"},
        },
        {"build": "ROCm 7.0", "driver": "", "gpus": (Gpu("MI300X", (9, 4), 192 << 30),)},
    ],
)
def test_good_machines(change):
    assert diagnose(Machine(**LINUX | change)) == []


def test_an_error_decides_the_exit_status(monkeypatch):
    bad = Machine(**LINUX | {"gpus": (), "driver": ""} | BAD["wrong-value"])
    monkeypatch.setattr(machine, "examine", lambda: bad)
    monkeypatch.setattr(paths, "paths", lambda device: [])
    assert not command.report("cpu", None)["right"]
    bad = Machine(**LINUX | {"gpus": (), "driver": ""} | BAD["unknown-variable"])
    found = command.report("cpu", None)
    assert found["right"], "a warning does not"
    assert "UNKNOWN: nothing reads it" in found["variables"]["GRPO_FAST_STRIKT"]


def test_a_gpu_that_cannot_be_used_is_reported(monkeypatch):
    """A fallback is a line under its operator, whatever GRPO_FAST_STRICT says, and stays a fallback."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    monkeypatch.setenv("GRPO_FAST_ON_CHIP", "1")
    monkeypatch.setenv("GRPO_FAST_STRICT", "1")
    monkeypatch.setattr(paths, "V", 64)
    (grpo,) = (x for x in paths.paths(CPU) if x.operator == "grpo")
    assert "GRPO_FAST_ON_CHIP=1 has no effect here: PyTorch's operators run" in grpo.fallbacks[0]
    assert "grpo_fwd_bwd" in grpo.ran
    assert os.environ["GRPO_FAST_STRICT"] == "1"


def test_ranges_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *extras["train"],
        *extras["verl"],
        *extras["openrlhf"],
        *extras["trl"],
    ]
    for text in wanted:
        name, rest = re.match(r"([\w-]+)(.*)", text.partition(";")[0].strip()).groups()
        bounds = dict(re.findall(r"(>=|<)([\d.]+)", rest))
        if name in RANGES and bounds:
            assert RANGES[name] == (bounds.get(">="), bounds.get("<")), name


def test_variables_of_the_benchmarks_are_known():
    text = "".join(x.read_text() for x in (ROOT / "benchmarks").rglob("*.py"))
    assert set(re.findall(r'"(GRPO_FAST_\w+)"', text)) - set(VARIABLES) == OF_BENCHMARKS


def test_the_page_lists_variables_and_combinations():
    for name, (values, _) in VARIABLES.items():
        (row,) = re.findall(rf"^\| `{name}` \| (.*) \|$", PAGE, re.MULTILINE)
        assert all(f"`{value}`" in row for value in values), name
    for one in COMBINATIONS:
        assert re.search(rf"^\| `{one.name}` \| {one.severity} \|", PAGE, re.MULTILINE), one.name


def test_a_fallback_ends_a_command_with_its_message(monkeypatch, capsys):
    def train(arguments):
        raise FallbackError("GRPO_FAST_STRICT=1: a test")

    monkeypatch.setitem(cli.COMMANDS, "train", train)
    assert cli.run("train", []) == 1
    assert capsys.readouterr().err == "grpo-fast train: error: GRPO_FAST_STRICT=1: a test\n"


def test_versions_are_compared_by_their_numbers():
    assert is_between("2.13.0+cpu", "2.9", "2.14")
    assert is_between("3", "3.0")
    assert not is_between("2.9.1", combinations.MIXED)
    assert not is_between("0", combinations.MIXED)


WITHOUT_EXTRAS = """
import importlib.util, sys

HIDDEN = {"transformers", "trl", "peft", "accelerate", "tokenizers", "safetensors", "matplotlib", "yaml"}
HIDDEN |= {"huggingface_hub", "filelock", "rich", "plotly", "datasets"}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in HIDDEN else find_spec(name)
from grpo_fast.trainer import cli

sys.exit(cli.main(["doctor", "--no-check"]))
"""


def test_it_needs_torch_alone():
    environment = {"GRPO_FAST_BACKEND": "torch", "PATH": "/bin:/usr/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "shared prompts: not available: transformers is not installed" in done.stdout
