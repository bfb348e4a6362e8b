"""The line that a run with TRL prints, and the adapter as seen by type checkers, pickle and `import *`."""

import contextlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", "1.15", reason="it is a subclass of TRL's trainer")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of TRL and its libraries
    pytest.mark.usefixtures("torch_backend"),
]

from transformers import MixtralConfig, MixtralForCausalLM  # noqa: E402
from transformers import trainer as their_trainer  # noqa: E402
from trl import GRPOTrainer as Stock  # noqa: E402

from grpo_fast.integrations.trl import GRPOTrainer  # noqa: E402
from grpo_fast.trainer.model import character_tokenizer  # noqa: E402
from tests.support import ranks  # noqa: E402
from tests.support.trl_losses import SIZES  # noqa: E402
from tests.support.trl_training import train  # noqa: E402

NOT = "grpo_fast: not fused, TRL's own loss runs: "


def lines_of(text):
    """The lines about the head and the loss; those about prompts are in test_trl_sharing.py."""
    return [
        line
        for line in text.splitlines()
        if line.startswith("grpo_fast:") and not line.startswith("grpo_fast: prompts ")
    ]


def start(cls, capsys, model_path, tokenizer, tmp_path, **options):
    """The only line that a run of two steps prints."""
    capsys.readouterr()
    train(cls, model_path, tokenizer, tmp_path, **({"max_steps": 2} | options))
    (line,) = lines_of(capsys.readouterr().out)
    return line


def test_fused(capsys, model_path, tokenizer, tmp_path, monkeypatch):
    given = (GRPOTrainer, capsys, model_path, tokenizer, tmp_path)
    where = "(LlamaForCausalLM, dapo, PyTorch path: GRPO_FAST_BACKEND=torch)"
    assert start(*given) == f"grpo_fast: head and loss fused {where}"
    monkeypatch.delenv("GRPO_FAST_BACKEND")
    where = "(LlamaForCausalLM, grpo, PyTorch path: the device is cpu, the kernels need a GPU)"
    assert start(*given, loss_type="grpo") == f"grpo_fast: head and loss fused {where}"
    quantile = "head, then loss (top_entropy_quantile < 1 needs all log-probs first), fused ("
    assert quantile in start(*given, top_entropy_quantile=0.5)


@pytest.mark.parametrize(
    "device, why, forced, interpret, want",
    [
        ("cuda", "", "", "0", "Triton kernels"),
        ("cuda", "", "", "1", "Triton's interpreter"),
        ("cuda", "Triton is not installed", "", "0", "PyTorch path: Triton is not installed"),
        ("cuda", "", "torch", "1", "PyTorch path: GRPO_FAST_BACKEND=torch"),
        ("cpu", "", "triton", "1", "Triton's interpreter"),
        ("mps", "", "", "1", "PyTorch path: the device is mps, the kernels need a GPU"),
    ],
)
def test_which_implementation(device, why, forced, interpret, want, monkeypatch):
    from grpo_fast.ops import backend

    monkeypatch.setattr(backend, "why_no_triton", lambda: why)
    monkeypatch.setenv("GRPO_FAST_BACKEND", forced)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert backend.implementation(SimpleNamespace(device=torch.device(device))) == want


def test_off_policy_mask_on_the_samplers_log_probs(model_path, tokenizer, tmp_path):
    said = []

    def prepare(trainer):
        trainer.use_vllm, trainer.off_policy_mask_threshold = True, 0.1
        said.append(trainer._what_is_fused())
        trainer.use_vllm = False

    train(GRPOTrainer, model_path, tokenizer, tmp_path, prepare=prepare, max_steps=1)
    assert said[0].startswith(
        "head, then loss (off_policy_mask_threshold needs all log-probs first)"
    )


def test_every_call_of_train_says_it(capsys, model_path, tokenizer, tmp_path):
    trainers = []
    train(GRPOTrainer, model_path, tokenizer, tmp_path, prepare=trainers.append, max_steps=1)
    trainers[0].train()
    assert len(lines_of(capsys.readouterr().out)) == 2


def test_experts(capsys, tokenizer, tmp_path):
    """The option that the line names fuses the loss."""
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer)}
    path = str(tmp_path / "experts")
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2)).save_pretrained(path)
    given = (GRPOTrainer, capsys, path, tokenizer, tmp_path)
    line = start(*given)
    assert line.startswith(f"{NOT}router_aux_loss_coef=0.001 adds the auxiliary loss")
    assert "GRPOConfig(router_aux_loss_coef=0.0)" in line
    line = start(*given, router_aux_loss_coef=0.0)
    assert line.startswith("grpo_fast: head and loss fused (MixtralForCausalLM, dapo, ")


def test_subclasses(capsys, model_path, tokenizer, tmp_path):
    class Step(GRPOTrainer):
        @staticmethod
        def get_off_policy_mask(*args, **kwargs):
            return GRPOTrainer.get_off_policy_mask(*args, **kwargs)

    class Loss(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return 2 * super()._compute_loss(model, inputs)

    given = (capsys, model_path, tokenizer, tmp_path)
    want = "Step has its own get_off_policy_mask, which the fused loss does not call; it is fused without"
    assert start(Step, *given) == NOT + want
    assert start(Loss, *given).endswith(") where Loss._compute_loss calls GRPOTrainer's")


def test_torch_compile(capsys, model_path, tokenizer, tmp_path, monkeypatch):
    """The backbone runs compiled, beside the fused loss; the check of the head compiles nothing."""
    from torch._dynamo.utils import counters

    from grpo_fast.integrations.trl import trainer

    check, graphs = trainer.check_head, []

    def counted(model):
        check(model)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(trainer, "check_head", counted)
    torch.compiler.reset()
    counters.clear()
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    want, _ = train(Stock, model_path, tokenizer, tmp_path, max_steps=2)
    capsys.readouterr()
    got, _ = train(GRPOTrainer, model_path, tokenizer, tmp_path, **options)
    assert lines_of(capsys.readouterr().out)[0].startswith(
        "grpo_fast: head and loss fused (LlamaForCausalLM, dapo, "
    )
    assert graphs == [0]
    assert counters["stats"]["unique_graphs"] > 0
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-6)
    torch.compiler.reset()


def test_liger(monkeypatch, capsys, model_path, tokenizer, tmp_path):
    """Liger's layers run without its fused loss, which TRL removes, and refuses if it is asked for."""
    given = []
    monkeypatch.setattr(their_trainer, "apply_liger_kernel", lambda _, kwargs: given.append(kwargs))
    line = start(GRPOTrainer, capsys, model_path, tokenizer, tmp_path, use_liger_kernel=True)
    assert line.startswith("grpo_fast: head and loss fused (LlamaForCausalLM, dapo, ")
    assert given == [{"fused_linear_cross_entropy": False}]
    options = {
        "use_liger_kernel": True,
        "liger_kernel_config": {"fused_linear_cross_entropy": True},
    }
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        train(GRPOTrainer, model_path, tokenizer, tmp_path, **options)


def train_with_images_on_one_rank(model_path, output):
    """Rank 1 alone has images (none, but their number, which a text model ignores)."""
    tokenizer = character_tokenizer("abcdefgh")
    tokenizer.padding_side = "left"
    rank = int(os.environ["RANK"])

    def prepare(trainer):
        trainer._is_vlm = True
        fused = trainer._compute_loss
        image = {"num_images": [0] * 4} if rank == 1 else {}
        trainer._compute_loss = lambda model, inputs: fused(model, inputs | image)

    options = {"per_device_train_batch_size": 4, "max_steps": 2}
    want, _ = train(Stock, model_path, tokenizer, Path(output), **options)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        got, _ = train(GRPOTrainer, model_path, tokenizer, Path(output), prepare, **options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-6)
    lines = lines_of(printed.getvalue())
    assert len(lines) == (2 if rank == 0 else 0), "the main process speaks, once"
    if rank == 0:
        assert lines[1].startswith(f"{NOT}the inputs of another process are not text alone")


def test_images_on_one_of_two_ranks(model_path, tmp_path):
    """Both take TRL's loss: its metrics are gathered in other pieces, and one would wait for the other."""
    function = "tests.integrations.test_trl_start:train_with_images_on_one_rank"
    ranks.run(function, 2, model_path, str(tmp_path))


CODE = """
from grpo_fast.integrations.trl import GRPOTrainer

class Mine(GRPOTrainer):
    pass

reveal_type(Mine)
reveal_type(GRPOTrainer(model="a", reward_funcs=len).current_objective())
"""


def test_type_checkers_see_a_class(tmp_path):
    pytest.importorskip("mypy", reason="the type checker of this test")
    (tmp_path / "script.py").write_text(CODE)
    ini = "[mypy]\n[mypy-torch.*,transformers.*,trl.*,grpo_fast.kernels.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(f"{ini}ignore_missing_imports = true\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "script.py"]
    root = str(Path(__file__).resolve().parents[2])
    out = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "MYPYPATH": root}
    ).stdout
    assert (
        'Revealed type is "def (*args: Any, share_prompts: str =, **kwargs: Any) -> script.Mine"'
        in out
    ), out
    assert 'Revealed type is "grpo_fast.objective.Objective"' in out, out


def test_pickle_and_import_star():
    assert pickle.loads(pickle.dumps(GRPOTrainer)) is GRPOTrainer
    names = {}
    exec("from grpo_fast.integrations.trl import *", names)
    assert names["GRPOTrainer"] is GRPOTrainer
    assert {"objective", "patch"} <= names.keys()
