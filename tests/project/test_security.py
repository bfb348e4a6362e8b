"""What SECURITY.md promises: nothing that comes with a model or a run is executed; no network unasked."""

import ast
import json
import pickle
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from grpo_fast.doctor import machine
from grpo_fast.doctor.combinations import diagnose
from grpo_fast.trainer import checkpoints, cli, known_models, loading, model, report, rewards
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.parsing import parse
from tests.support.tiny_runs import EVEN, arguments, given_model

ROOT = Path(__file__).resolve().parents[2]
MODULES = [p for p in ROOT.glob("grpo_fast/**/*.py") if "kernels" not in p.parts]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return given_model(tmp_path_factory.mktemp("given"))


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that exists as soon as something hostile was executed."""
    path = tmp_path / "executed"
    monkeypatch.setenv("MARKER", str(path))
    yield path
    assert not path.exists()


CODE = "import os, pathlib\npathlib.Path(os.environ['MARKER']).touch()\n"


class Bomb:
    """A pickle that touches the marker where it is read."""

    def __reduce__(self):
        return exec, (CODE,)


def test_a_bomb_goes_off(tmp_path, monkeypatch):
    """Else the tests below would pass whatever the code did."""
    monkeypatch.setenv("MARKER", str(tmp_path / "executed"))
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "executed").exists()


def copy_of(given, folder, **changes):
    """A copy of the model, with other values in its files: `config={...}`, `tokenizer_config={...}`."""
    shutil.copytree(given, folder)
    for name, values in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_weights_are_no_pickles(given, tmp_path, marker):
    folder = copy_of(given, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        ValueError, match=r"no model.safetensors. Weights in other files may be pickles"
    ):
        loading.load(str(folder))
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="weights: Error while deserializing header"):
        loading.load(str(folder))


def test_the_code_of_a_model_does_not_run(given, tmp_path, marker):
    classes = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    strange = {"model_type": "strange", "auto_map": classes}
    folder = copy_of(given, tmp_path / "model", config=strange)
    words = "it needs code of its own .trust_remote_code., which is not run"
    (folder / "code.py").write_text(CODE)
    with pytest.raises(ValueError, match=f"weights: {words}"):
        loading.load(str(folder))
    with pytest.raises(ValueError, match=words):
        known_models.describe(str(folder))
    with pytest.raises(ValueError, match=words):
        rewards.RewardModel(str(folder), "cpu")


def test_the_code_of_a_tokenizer_does_not_run(given, tmp_path, marker):
    strange = {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    folder = copy_of(given, tmp_path / "model", tokenizer_config=strange)
    (folder / "code.py").write_text(CODE)
    with pytest.raises(ValueError, match="tokenizer: it needs code of its own"):
        loading.load(str(folder))


def test_other_code_beside_a_model_does_not_run(given, tmp_path, marker):
    """A known type of model comes from transformers; a template runs in a sandbox."""
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    folder = copy_of(
        given,
        tmp_path / "model",
        config={"auto_map": {"AutoModelForCausalLM": "code.M"}},
        tokenizer_config={"chat_template": template},
    )
    (folder / "custom_generate").mkdir()
    for path in (folder / "code.py", folder / "custom_generate" / "generate.py"):
        path.write_text(CODE)
    loaded, tokenizer = loading.load(str(folder))
    assert type(loaded).__module__.startswith("transformers.")
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_every_loader_refuses_code():
    """Also those that no test above calls; ruff's rules S find other pickles, `eval` and shells."""
    found = 0
    for path in MODULES:
        text = path.read_text()
        assert "torch.load(" not in text, path
        if ".from_pretrained(" not in text:
            continue
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".from_pretrained"):
                words = {word.arg: ast.unparse(word.value) for word in call.keywords}
                refused = words.get("trust_remote_code") == "False"
                # PEFT's adapters and files in the format GGUF have no code.
                assert refused or "PeftModel" in ast.unparse(call) or "gguf_file" in words, path
                found += 1
    assert found > 4


def test_the_state_of_a_run_is_no_pickle(tmp_path, marker):
    (tmp_path / "training_state.json").write_text('{"processes": null}')
    (tmp_path / "training_state-00000.safetensors").write_bytes(pickle.dumps(Bomb()))
    learner = SimpleNamespace(team=SimpleNamespace(size=1, rank=0), sharded=False)
    with pytest.raises(
        ValueError, match=r"resume: .*training_state-00000.safetensors: Error while"
    ):
        checkpoints.restore(learner, tmp_path)


def test_an_adapter_is_no_pickle(tmp_path, marker):
    pytest.importorskip("peft", reason="the adapters are PEFT's")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        model.adapted(None, TrainConfig(model="m", use_peft=True), tmp_path)


# The second would need 10^9 texts.
NESTED = "reward: [&a [x, x], &b [{}], &c [{}], *c]\n".format(
    *(", ".join([x] * 9) for x in ("*a", "*b"))
)
YAML = {"object": f"steps: !!python/object/apply:builtins.exec [{CODE!r}]\n", "aliases": NESTED}


@pytest.mark.parametrize("name", YAML)
def test_a_configuration_is_plain_values(tmp_path, marker, name):
    path = tmp_path / "config.yaml"
    path.write_text(YAML[name])
    with pytest.raises(ValueError, match="not YAML: "):
        parse([str(path)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
    assert "No config.yaml was found" in report.write(tmp_path).read_text()


@pytest.mark.parametrize("name", ["../run", "/run", "a/b", "..", "run/", ""])
def test_a_run_stays_in_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="name: want the name of a folder in output_dir"):
        TrainConfig(output_dir=str(tmp_path), name=name)


def test_a_report_runs_nothing_of_the_run(tmp_path, marker):
    """`--resume` and `eval` import the reward functions that a run names; this only shows their names."""
    (tmp_path / "hostile_reward.py").write_text(CODE)
    options = f"reward: [hostile_reward:f]\nreward_dir: {tmp_path}\n"
    (tmp_path / "config.yaml").write_text(options)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
    assert "hostile_reward:f" in report.write(tmp_path).read_text()
    assert "hostile_reward" not in sys.modules


def test_no_network_unless_asked(given, tmp_path, monkeypatch, capsys):
    """The commands, on a model in a folder. Errors may be caught, so the calls are counted."""
    asked = []

    def refuse(*given, **_):
        asked.append(given)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    options = {**EVEN, "steps": 2, "heldout": 2, "name": "run", "model": str(given)}
    run = str(tmp_path / "run")
    commands = (
        ["train", *arguments(tmp_path, **options)],
        ["eval", run, "--device=cpu"],
        ["report", run],
        ["explain", run, "--device=cpu", "--updates=1", f"--output={tmp_path / 'step.html'}"],
    )
    for command in commands:
        assert cli.main(command) == 0, capsys.readouterr().err
    known_models.describe(str(given))  # for `plan`
    diagnose(machine.examine())  # for `doctor`
    assert not asked
    assert (tmp_path / "run" / "report.html").exists()
