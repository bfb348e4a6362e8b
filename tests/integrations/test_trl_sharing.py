"""TRL's trainer with shared prompts: the training of TRL's own."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", "1.15", reason="it is a subclass of TRL's trainer")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of TRL and its libraries
    pytest.mark.usefixtures("torch_backend"),
]

from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig  # noqa: E402
from trl import GRPOTrainer as Stock  # noqa: E402

from grpo_fast import shared_prompt  # noqa: E402
from grpo_fast.integrations.trl import GRPOTrainer, sharing  # noqa: E402
from grpo_fast.notices import FallbackError  # noqa: E402
from tests.support import ranks  # noqa: E402
from tests.support.trl_training import as_fsdp2, assert_same_logs, train  # noqa: E402

PROMPTS = [
    "abcdeabcdeabcdeabcdeabcde",
    "bbbbbaaaaaccccceeeee",
    "edcbaedcbaedcbaedcba",
    "acacacacacacacacacacacacac",
    "ddddddddddddddddddddd",
    "abababababababababababab",
    "cdecdecdecdecdecdecde",
    "eeeeabcdeeeeabcdeeee",
]


def shared(monkeypatch):
    """The routes that the forwards of a run take."""
    routes, ran = [], shared_prompt.passes.ROUTES
    for name, route in dict(ran).items():

        def record(*arguments, name=name, route=route, **options):
            routes.append(name)
            return route(*arguments, **options)

        monkeypatch.setitem(ran, name, record)
    return routes


RUNS = {
    "plain": {},
    "accumulated": {
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "beta": 0.04,
        "per_device_train_batch_size": 4,
    },
    "checkpointed": {"gradient_checkpointing": True, "loss_type": "grpo", "num_iterations": 2},
    "masked": {"mask_truncated_completions": True},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1, "loss_type": "bnpo"},
}


ROUTES = {name: ["auto", "fork"] for name in RUNS}
ROUTES["plain"] += ["packed", "mask"]
ROUTES["accumulated"].append("bounded")
ROUTES["checkpointed"].append("bounded")


@pytest.mark.parametrize("run", RUNS)
def test_the_training_is_trls(run, model_path, tokenizer, tmp_path, monkeypatch):
    given = {"prompts": PROMPTS}
    want, their_logs = train(Stock, model_path, tokenizer, tmp_path, given=given, **RUNS[run])
    start = AutoModelForCausalLM.from_pretrained(model_path).state_dict()
    assert max((x - start[name]).abs().max() for name, x in want.items()) > 1e-2
    for route in ROUTES[run]:
        own = given | {"share_prompts": route}
        with monkeypatch.context() as patch:
            routes = shared(patch)
            got, logs = train(GRPOTrainer, model_path, tokenizer, tmp_path, given=own, **RUNS[run])
        assert {"packed", "mask"} & set(routes) if route == "auto" else route in routes
        assert got.keys() == want.keys()
        for name, x in got.items():
            torch.testing.assert_close(
                x, want[name], rtol=0, atol=1e-6, msg=lambda text, route=route: f"{route}: {text}"
            )
        assert_same_logs(logs, their_logs)


def test_an_adapter(model_path, tokenizer, tmp_path, monkeypatch):
    """The reference is the base model, without the adapter."""
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    adapter = peft.LoraConfig(r=4, lora_alpha=64)
    options = {"beta": 0.04, "num_iterations": 2, "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 4, "peft_config": adapter}
    given = {"prompts": PROMPTS}
    want, their_logs = train(Stock, model_path, tokenizer, tmp_path, given=given, **options)
    for route in ("packed", "mask", "fork"):
        own = given | {"share_prompts": route}
        with monkeypatch.context() as patch:
            routes = shared(patch)
            got, logs = train(GRPOTrainer, model_path, tokenizer, tmp_path, given=own, **options)
        assert route in routes
        for name, x in got.items():
            torch.testing.assert_close(
                x, want[name], rtol=0, atol=1e-6, msg=lambda text, route=route: f"{route}: {text}"
            )
        assert_same_logs(logs, their_logs)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_positions_are_those_that_the_model_counts_by_itself(
    kind, tokenizer, tmp_path, monkeypatch
):
    """GPT-2 counts the padding before a prompt, OPT does not; both have a table of positions."""
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = (
        GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **sizes)
        if kind == "gpt2"
        else OPTConfig(
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
            **sizes,
        )
    )
    for name, value in vars(config).items():
        if "pdrop" in name or "dropout" in name:
            setattr(config, name, type(value)(0))
    torch.manual_seed(0)
    path = str(tmp_path / kind)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    given = {"prompts": PROMPTS}
    want, _ = train(Stock, path, tokenizer, tmp_path, given=given)
    routes = shared(monkeypatch)
    got, _ = train(GRPOTrainer, path, tokenizer, tmp_path, given=given)
    assert {"packed", "mask"} & set(routes)
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=0, atol=1e-6)


def test_off(model_path, tokenizer, tmp_path, monkeypatch):
    """Nothing of shared prompts runs."""
    monkeypatch.setattr(sharing.shared_prompt, "plan", None)
    given = {"prompts": PROMPTS, "share_prompts": "off"}
    train(GRPOTrainer, model_path, tokenizer, tmp_path, given=given, max_steps=1)


def test_what_it_prints(model_path, tokenizer, tmp_path, capsys):
    """One line for each route, not one for each batch."""
    train(GRPOTrainer, model_path, tokenizer, tmp_path, given={"prompts": PROMPTS})
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("grpo_fast: prompts")]
    routes = [
        line.removeprefix("grpo_fast: prompts shared, route ").split(":")[0] for line in lines
    ]
    assert set(routes) <= {"packed", "mask"}
    assert len(routes) == len(set(routes)) > 0
    assert all("times the work" in line for line in lines)


def test_a_model_with_dropout(tokenizer, tmp_path, model_path, capsys):
    """Its prompts are not shared, a line says why, and a route that was asked for is an error."""

    def prepare(trainer):
        for layer in trainer.model.model.layers:
            layer.self_attn.attention_dropout = 0.1

    given = {"prompts": PROMPTS}
    run = (model_path, tokenizer, tmp_path, prepare)
    train(GRPOTrainer, *run, given=given, max_steps=1)
    assert "grpo_fast: prompts not shared: attention_dropout 0.1 in " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"route='fork': attention_dropout 0\.1 in "):
        train(GRPOTrainer, *run, given=given | {"share_prompts": "fork"}, max_steps=1)


@pytest.mark.parametrize("second, refused", [([0, 5, 6], True), ([0, 5, 7], False)])
def test_strict_asks_whether_prompts_repeat(second, refused, monkeypatch):
    """A batch that cannot be planned, as with prefix tuning; the first column is padding."""

    def refuse(self, model, mask):
        raise ValueError("virtual tokens")

    monkeypatch.setattr(sharing.Sharing, "_positions", refuse)
    monkeypatch.setenv("GRPO_FAST_STRICT", "1")
    said = []
    ours = sharing.Sharing("auto", said.append)
    ids = torch.tensor([[9, 5, 6, 1], [*second, 2]])
    mask = torch.tensor([[0, 1, 1, 1]] * 2)
    if refused:
        with pytest.raises(FallbackError, match="prompts not shared: virtual tokens"):
            ours._plan(None, ids, mask, 1)
    else:
        assert ours._plan(torch.nn.Linear(1, 1), ids, mask, 1) is None
        assert said == ["prompts not shared: virtual tokens"]


def test_strict_waits_for_the_other_processes(monkeypatch):
    """Where processes share the weights, `shared_prompt` raises on all of them."""
    impossible = sharing.Impossible("unshared", "dropout")
    monkeypatch.setattr(sharing.Sharing, "_positions", lambda self, model, mask: None)
    monkeypatch.setattr(sharing.shared_prompt, "choose", lambda *_: impossible)
    monkeypatch.setenv("GRPO_FAST_STRICT", "1")
    ours = sharing.Sharing("auto", lambda line: None)
    ids = torch.tensor([[5, 6, 1], [5, 6, 2]])
    for sharded in (True, False):
        monkeypatch.setattr(sharing, "is_sharded", lambda model, sharded=sharded: sharded)
        if sharded:
            assert len(ours._plan(None, ids, torch.ones_like(ids), 1).prompt_lengths) == 1
        else:
            with pytest.raises(FallbackError, match="prompts not shared: dropout"):
                ours._plan(None, ids, torch.ones_like(ids), 1)


def test_a_wrong_option(model_path, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"share_prompts: want one of auto, off, .*, got True"):
        train(GRPOTrainer, model_path, tokenizer, tmp_path, given={"share_prompts": True})


def train_on_a_rank(path, output, sharded):
    from torch.distributed.tensor import DTensor
    from transformers import AutoTokenizer

    options = {"beta": 0.04, "num_iterations": 2, "max_steps": 2, "per_device_train_batch_size": 4}
    if sharded:
        options["prepare"] = as_fsdp2
    given = {"prompts": PROMPTS}
    tokens = AutoTokenizer.from_pretrained(path)
    want, their_logs = train(Stock, path, tokens, Path(output), given=given, **options)
    for route in ("auto", "bounded"):
        own = given | {"share_prompts": route}
        got, logs = train(GRPOTrainer, path, tokens, Path(output), given=own, **options)
        for name, x in got.items():
            both = [y.full_tensor() if isinstance(y, DTensor) else y for y in (x, want[name])]
            torch.testing.assert_close(*both, rtol=0, atol=1e-6)
        assert_same_logs(logs, their_logs)


@ranks.needs_gloo
def test_two_processes(model_path, tmp_path):
    """With DDP, then with FSDP2."""
    where = "tests.integrations.test_trl_sharing:train_on_a_rank"
    cases = [[model_path, str(tmp_path), sharded] for sharded in (False, True)]
    ranks.run_each(where, 2, cases)
