"""The names outside checks call, what importing them costs, and where Triton does not exist."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grpo_fast.loss
import grpo_fast.ops
from grpo_fast import Objective

ROOT = Path(__file__).resolve().parents[2]

LOSS = ["mask", "old_logps", "ref_logps", "importance_weights", "token_weights", "scores"]
SIGNATURES = {
    grpo_fast.loss.grpo_loss: (
        ["logits", "completion_ids"],
        [
            *(
                "advantages",
                "rewards",
                "group_size",
                *LOSS,
                "num_items",
                "loss_scale",
                "cu_seqlens",
            ),
            *("temperature", "objective", "return_entropy", "inplace"),
        ],
    ),
    grpo_fast.loss.policy_loss: (
        ["logps"],
        ["advantages", *LOSS, "entropy", "num_items", "loss_scale", "cu_seqlens", "objective"],
    ),
    grpo_fast.loss.linear_grpo_loss: (
        ["hidden", "weight", "completion_ids"],
        [
            *("bias", "softcap", "logit_scale", "logits_dtype", "vocab_size", "compact"),
            *(
                "chunk_size",
                "lora",
                "tp_group",
                "dw_out",
                "advantages",
                "rewards",
                "group_size",
                *LOSS,
            ),
            *(
                "num_items",
                "loss_scale",
                "cu_seqlens",
                "temperature",
                "objective",
                "return_entropy",
            ),
        ],
    ),
    grpo_fast.ops.linear_logprob: (
        ["hidden", "weight", "ids"],
        [
            *("bias", "softcap", "logit_scale", "temperature", "mask", "return_entropy"),
            *("logits_dtype", "vocab_size", "compact", "chunk_size", "lora", "tp_group"),
        ],
    ),
    grpo_fast.ops.logprob: (["logits", "ids"], ["temperature", "mask", "return_entropy"]),
    grpo_fast.ops.group_advantage: (
        ["rewards"],
        [
            *("group_size", "group_ids", "scale", "eps", "unbiased"),
            *("baseline", "weights", "aggregation", "nan", "singleton"),
        ],
    ),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures(function):
    positional, keywords = SIGNATURES[function]
    parameters = inspect.signature(function).parameters
    assert list(parameters) == positional + keywords
    assert all(parameters[k].kind is inspect.Parameter.KEYWORD_ONLY for k in keywords)


TOP_LEVEL = [
    *("LossOutput", "Objective", "check_invariance", "diagnostics", "fold_statistics"),
    *("group_advantage", "grpo_loss"),
    *("linear_grpo_loss", "linear_logprob", "logprob", "loss", "metrics_from", "ops"),
    *("policy_loss", "presets", "reference", "token_diagnostics", "weights"),
]


def test_names():
    assert set(TOP_LEVEL) == set(grpo_fast.__all__)
    assert set(TOP_LEVEL) <= set(dir(grpo_fast))
    assert grpo_fast.ops.__all__ == ["group_advantage", "linear_logprob", "logprob"]
    assert grpo_fast.loss.LossOutput._fields[:4] == ("loss", "logps", "entropy", "metrics")
    assert callable(Objective.preset)


# The modules that outside code imports, and the names it finds there.
MODULES = {
    "grpo_fast.diagnostics": ["TokenDiagnostics", "kl_estimate", "token_diagnostics"],
    "grpo_fast.integrations.areal": ["cispo_loss_fn", "patch", "ppo_actor_loss_fn", "sapo_loss_fn"],
    "grpo_fast.integrations.miles": ["policy_loss"],
    "grpo_fast.integrations.nemo_rl": ["clipped_pg_loss", "patch"],
    "grpo_fast.integrations.openrlhf": ["PolicyLoss", "patch"],
    "grpo_fast.integrations.prime_rl": ["default_loss", "ipo_loss", "loss"],
    "grpo_fast.integrations.skyrl": ["POLICY_LOSSES", "register"],
    "grpo_fast.integrations.slime": ["policy_loss"],
    "grpo_fast.integrations.transformers": ["check_head", "head_of", "hidden_states", "with_head"],
    "grpo_fast.integrations.trl": ["objective", "patch"],  # and GRPOTrainer, with TRL
    "grpo_fast.integrations.verl": ["POLICY_LOSSES", "patch_logprobs", "register"],
    "grpo_fast.integrations.xtuner": ["policy_loss"],
    "grpo_fast.invariance": ["InvarianceReport", "Operator", "check_invariance"],
    "grpo_fast.objective": ["KL", "Objective", "Surrogate"],
    "grpo_fast.presets": ["PRESETS"],
    "grpo_fast.reference": [
        "grpo_loss",
        "group_advantage",
        "linear_grpo",
        "logprob",
        "policy_loss",
    ],
    "grpo_fast.testing": ["assert_as_accurate"],
    "grpo_fast.weights": [
        *("binary_divergence", "clip_cov", "geometric_mean", "icepop", "importance_weights"),
        *("kl_cov", "kpop", "m2po", "top_entropy", "truncated_importance", "varied_groups"),
    ],
}
OPERATORS = [
    *("combine_rewards", "group_advantage", "grpo", "grpo_", "linear_grpo", "linear_logprob_bwd"),
    *("linear_logprob_fwd", "logprob_bwd", "logprob_fwd", "policy_loss", "reduction_weights"),
    *("scale_", "scale_rows_", "scaled_to", "sequence_loss", "token_statistics", "weigh_rows"),
]
KERNELS = [
    *("combine_rewards", "group_advantage", "grpo", "logprob_bwd", "logprob_fwd", "move_rows"),
    *("on_chip", "policy_loss", "reduction_weights", "scale", "scale_rows", "sequence_loss"),
    *("token_statistics", "weigh_rows"),
]


@pytest.mark.parametrize("module", MODULES)
def test_modules(module):
    found = importlib.import_module(module)
    assert all(hasattr(found, name) for name in MODULES[module])


def test_operators_and_kernels():
    for name in OPERATORS:
        assert hasattr(torch.ops.grpo_fast, name), name
    text = "".join(path.read_text() for path in ROOT.glob("kernels/*.py"))
    assert sorted(re.findall(r"^def _(\w+)_kernel\(", text, re.MULTILINE)) == sorted(KERNELS)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_every_function_is_at_the_top():
    """In a fresh process, where nothing else was imported: the names, the modules, a star, a typo."""
    run(
        "import sys, grpo_fast\n"
        "assert 'grpo_fast.ops' not in sys.modules  # the operators are loaded at first use\n"
        f"from grpo_fast import {', '.join(TOP_LEVEL)}\n"
        "assert grpo_fast.loss.grpo_loss is grpo_loss and callable(grpo_fast.ops.logprob)\n"
        "assert logprob is grpo_fast.ops.logprob\n"
        "assert grpo_fast.weights.top_entropy\n"
        "try: grpo_fast.grpo_lossy\n"
        "except AttributeError as e: assert 'grpo_lossy' in str(e)\n"
        "else: raise AssertionError\n"
    )
    run("import grpo_fast\nassert callable(grpo_fast.loss.grpo_loss)")
    run("from grpo_fast import *\nassert callable(policy_loss) and callable(loss.policy_loss)")


def test_types_are_those_of_the_code():
    """What a type checker reads under TYPE_CHECKING is what `__getattr__` gives."""
    tree = ast.parse(Path(grpo_fast.__file__).read_text())
    (block,) = [x for x in tree.body if isinstance(x, ast.If)]
    seen = {(x.module, name.name) for x in block.body for name in x.names}
    modules = {("grpo_fast", name) for name in grpo_fast._MODULES}
    assert seen == modules | {(f"grpo_fast.{home}", x) for x, home in grpo_fast._HOME.items()}


def test_a_compiled_function_may_call_them_by_the_package():
    run(
        "import torch, grpo_fast\n"
        "f = torch.compile(lambda x, A: grpo_fast.policy_loss(x, advantages=A).loss,\n"
        "                  backend='eager', fullgraph=True)\n"
        "assert f(torch.zeros(2, 3), torch.ones(2)) == -1\n"
    )


def test_import_is_light():
    run(
        "import sys, grpo_fast, grpo_fast.loss, grpo_fast.ops, torch\n"
        "heavy = {'transformers', 'trl', 'matplotlib', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )


def test_works_without_the_compiler_of_the_kernels():
    """As on macOS and Windows: the import is blocked, everything else must run."""
    run(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch\n"
        "from grpo_fast import Objective\n"
        "from grpo_fast.loss import grpo_loss\n"
        "from grpo_fast.ops import group_advantage, logprob\n"
        "logits = torch.randn(2, 3, 9, requires_grad=True)\n"
        "ids = torch.zeros(2, 3, dtype=torch.int64)\n"
        "logp, entropy = logprob(logits, ids, return_entropy=True)\n"
        "(logp.sum() + entropy.sum()).backward()\n"
        "out = grpo_loss(logits, ids, rewards=torch.tensor([0., 1.]), group_size=2)\n"
        "out.loss.backward()\n"
        "assert group_advantage(torch.tensor([0., 1.]), group_size=2).isfinite().all()\n"
    )
