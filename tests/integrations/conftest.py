"""Fixtures of the adapters' tests.

What not every adapter needs is imported where it is used: the others are tested without it.
"""

import importlib
import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.support.hosts import host_batch
from tests.support.oracles import verl_core_algos


@pytest.fixture
def batch(device):
    """Padded tensors of one batch, for the hosts that take those."""
    return host_batch(device)


@pytest.fixture
def verl_installed(monkeypatch):
    """verl's core_algos where `import verl` finds it, with a version."""
    core = verl_core_algos()
    monkeypatch.setattr(core, "POLICY_LOSS_REGISTRY", dict(core.POLICY_LOSS_REGISTRY))
    tools, engine = ModuleType("verl.utils.torch_functional"), ModuleType("verl.workers.engine")
    tools.logprobs_from_logits = engine.logprobs_from_logits = lambda logits, labels: None
    fused = ModuleType("verl.utils.kernel.linear_cross_entropy")
    fused.linear_cross_entropy = engine.linear_cross_entropy = lambda *arguments: None
    for name, module in {
        "verl": ModuleType("verl"),
        "verl.trainer": ModuleType("verl.trainer"),
        "verl.trainer.ppo": ModuleType("verl.trainer.ppo"),
        "verl.trainer.ppo.core_algos": core,
        "verl.utils": ModuleType("verl.utils"),
        "verl.utils.torch_functional": tools,
        "verl.utils.kernel": ModuleType("verl.utils.kernel"),
        "verl.utils.kernel.linear_cross_entropy": fused,
        "verl.workers": ModuleType("verl.workers"),
        "verl.workers.engine": engine,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    version = SimpleNamespace(found="0.9.1")
    find = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version.found if name == "verl" else find(name)
    )
    return SimpleNamespace(core=core, tools=tools, engine=engine, version=version)


@pytest.fixture
def torch_backend(monkeypatch):
    """The PyTorch path on one thread: other tests compare the two paths, and the models are tiny."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    from grpo_fast.trainer.model import character_tokenizer

    tokenizer = character_tokenizer("abcdefgh")
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture(scope="module")
def model_path(tokenizer, tmp_path_factory):
    """A tiny Llama on disk: TRL loads the reference model from where the policy came from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """(TRL's trainer, ours), with equal weights."""
    from tests.support import trl_losses

    return trl_losses.pair(tmp_path_factory.mktemp("trainer"))
