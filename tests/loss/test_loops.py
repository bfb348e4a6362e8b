"""The loops of the documents and examples, on ragged batches that are padded on the left.

Each is held against the same sequences without any padding.
"""

import copy
import json
import re
import sys

import pytest
import torch

from grpo_fast import Objective
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.model import character_tokenizer
from tests.support import loops
from tests.support.examples import load

pytest.importorskip("transformers", reason="the loops are for its models")

# Where the loop is among the blocks of its page, and the objective it states.
LOOPS = {
    "docs/loop.md": (1, Objective.preset("grpo", beta=0.04)),
    "docs/linear.md": (0, Objective()),
    "docs/transformers.md": (0, Objective()),
    "docs/shared_prompts.md": (0, Objective()),
}
# Pages whose blocks other tests run, and how many each has.
ELSEWHERE = {
    "README.md": 2,  # below, and test_trl_docs
    "docs/start.md": 2,  # test_docs; below, the reward
    "docs/install.md": 1,  # test_docs, as the next four
    "docs/concepts.md": 7,
    "docs/numerics.md": 3,
    "docs/troubleshooting.md": 10,
    "docs/invariance.md": 1,
    "docs/loop.md": 1,  # below, the one that samples
    "docs/weights.md": 6,  # test_docs
    "docs/integrations.md": 2,  # test_diagnostics, test_hub
    "docs/metrics.md": 1,  # test_metrics
    "docs/scaling.md": 7,  # test_scaling
    "docs/shared_prompts.md": 1,  # below, the one with a backward for each part
    "docs/trainer.md": 1,  # test_trainer
    "docs/trl.md": 4,  # test_trl_docs
}


# Calls that need the trainer itself; test_docs looks for the names, the trainer's own tests call them.
NEED_THE_TRAINER = {
    "docs/trainers/skyrl.md": 1,
    "docs/trainers/openrlhf.md": 1,
    "docs/trainers/nemo_rl.md": 1,
    "docs/trainers/areal.md": 1,
}


def run(page, model, **names):
    """(the names that the block of a page leaves behind, the gradients of its first step)."""
    scope = {"model": model, "optimizer": loops.Recorder(model), **names}
    block = loops.blocks(page)[LOOPS[page][0]]
    exec(block, scope)
    return scope, scope["optimizer"].steps[0]


@pytest.mark.parametrize("name", loops.MODELS)
@pytest.mark.parametrize("page", LOOPS)
def test_a_loop_equals_sequences_without_padding(page, name, capsys):
    batch, model = loops.batch(), loops.MODELS[name]()
    ref_model = copy.deepcopy(model)
    with torch.no_grad():
        for x in ref_model.parameters():
            x.add_(0.05 * torch.randn_like(x))
    scope, got = run(page, model, ref_model=ref_model, **batch)
    sequences = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    mask = batch["completion_mask"]
    passed = sequences, attention, batch["completion_ids"], mask
    rewards = {"rewards": batch["rewards"], "group_size": loops.GROUP}
    objective = LOOPS[page][1]
    old_logps, _ = loops.expected(model, *passed, **rewards)
    ref_logps, _ = loops.expected(ref_model, *passed, **rewards)
    live = mask.bool()
    if "plan" in scope:
        scope["old_logps"] = scope["plan"].padded(scope["old_logps"])
    torch.testing.assert_close(scope["old_logps"][live], old_logps[live], rtol=0, atol=1e-5)
    if objective.beta:
        torch.testing.assert_close(scope["ref_logps"][live], ref_logps[live], rtol=0, atol=1e-5)
        rewards["ref_logps"] = ref_logps
    _, want = loops.expected(model, *passed, old_logps=old_logps, objective=objective, **rewards)
    loops.assert_same_gradients(got, want)
    if page == "docs/loop.md":
        assert "'clip_fraction_low'" in capsys.readouterr().out


def test_a_backward_for_each_part_equals_sequences_without_padding():
    """The second block of the page on shared prompts, on micro-batches of one completion."""
    batch, model = loops.batch(), loops.llama()
    advantages = torch.tensor([-1.0, 1.0, 0.5, -0.5])
    scope, _ = run("docs/shared_prompts.md", model, **batch)
    mask = batch["completion_mask"]
    scope |= {"advantages": advantages, "number_of_tokens": mask.sum()}
    model.zero_grad()
    code = loops.blocks("docs/shared_prompts.md")[1].replace("micro_batch=4", "micro_batch=1")
    exec(code, scope)
    assert len(scope["losses"]) == 4
    got = loops.gradients(model)
    passed = [
        torch.cat([batch[f"{x}_{y}"] for x in ("prompt", "completion")], 1) for y in ("ids", "mask")
    ]
    objective = Objective.preset("dapo")
    _, want = loops.expected(
        model, *passed, batch["completion_ids"], mask, advantages=advantages, objective=objective
    )
    loops.assert_same_gradients(got, want)


def test_the_example_with_shared_prompts_equals_sequences_without_padding():
    example = load("shared_prompts")
    model = example.build()
    batch = example.sample(model)
    plan = batch.plan
    assert not plan.prompt_mask.all(), "some prompts are padded"
    passed = [
        torch.cat([prompt[plan.prompt_of], completion], 1)
        for prompt, completion in (
            (plan.prompt_ids, plan.completion_ids),
            (plan.prompt_mask, plan.completion_mask),
        )
    ]
    passed += [plan.completion_ids, plan.completion_mask]
    given = {"rewards": batch.rewards, "group_size": example.GROUP}
    got_old = example.old_log_probs(model, plan)
    old_logps, _ = loops.expected(model, *passed, **given)
    torch.testing.assert_close(got_old, old_logps[plan.completion_mask], rtol=0, atol=1e-5)
    given |= {"old_logps": old_logps, "objective": example.OBJECTIVE}
    _, want = loops.expected(model, *passed, **given)
    model.zero_grad()
    example.loss_of(model, batch, got_old).loss.backward()
    loops.assert_same_gradients(loops.gradients(model), want)


def test_the_plain_example_equals_sequences_without_padding():
    example = load("plain_loop")
    model = example.build()
    batch = example.sample(model)
    assert (batch.attention[:, :6] == 0).any(), "some prompts are padded"
    passed = batch.sequences, batch.attention, batch.completions, batch.mask
    given = {"rewards": batch.rewards, "group_size": example.GROUP}
    got_old = example.old_log_probs(model, batch)
    old_logps, _ = loops.expected(model, *passed, **given)
    torch.testing.assert_close(got_old[batch.mask], old_logps[batch.mask], rtol=0, atol=1e-5)
    given |= {"old_logps": old_logps, "objective": example.OBJECTIVE}
    _, want = loops.expected(model, *passed, **given)
    model.zero_grad()
    example.loss_of(model, batch, old_logps).loss.backward()
    loops.assert_same_gradients(loops.gradients(model), want)


def test_the_accelerate_example_equals_sequences_without_padding():
    accelerate = pytest.importorskip("accelerate", reason="the example is for Accelerate")
    example = load("accelerate_loop")
    model = example.build()
    batch = example.sample(model, accelerate.Accelerator(cpu=True))
    assert (batch["attention"][:, :6] == 0).any(), "some prompts are padded"
    passed = [batch[name] for name in ("sequences", "attention", "completions", "mask")]
    given = {"rewards": batch["rewards"], "group_size": example.GROUP}
    _, want = loops.expected(model, *passed, objective=example.OBJECTIVE, **given)
    model.zero_grad()
    for i in range(example.MICRO_BATCHES):
        part = {name: x.chunk(example.MICRO_BATCHES)[i] for name, x in batch.items()}
        example.loss_of(model, part, batch["mask"].sum(), 1.0)[0].backward()
    loops.assert_same_gradients(loops.gradients(model), want)


@pytest.mark.filterwarnings("ignore")  # of TRL and its libraries
def test_trls_trainer_equals_sequences_without_padding(tmp_path):
    """The log-probs of both trainers. TRL passes no positions: rotary ones do not need them."""
    trl = pytest.importorskip("trl", "1.15", reason="it is a subclass of TRL's trainer")
    from datasets import Dataset

    from grpo_fast.integrations.trl import GRPOTrainer

    batch, model = loops.batch(), loops.llama()
    sequences = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    mask = batch["completion_mask"]
    logits = loops.unpadded_logits(model, sequences, attention, mask)
    want = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    tokenizer = character_tokenizer("abcdefgh")
    for cls in (trl.GRPOTrainer, GRPOTrainer):
        trainer = cls(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=Dataset.from_dict({"prompt": ["a"]}),
            processing_class=tokenizer,
        )
        got = trainer._get_per_token_logps_and_entropies(
            trainer.model, sequences, attention, mask.shape[1]
        )[0]
        live = mask.bool()
        torch.testing.assert_close(got[live], want[live], rtol=0, atol=1e-5)


def test_what_the_page_samples_is_what_it_scores(capsys):
    tokenizer = character_tokenizer("abcdefghijklmnopqrstuvwxyz12345678")
    model = loops.llama()
    kept = []
    generate = model.generate

    def watched(*given, **options):
        model.generation_config.top_k = 3  # as models on the hub come
        processors = model._get_logits_processor

        def note(*args, **kwargs):
            kept.append(processors(*args, **kwargs))
            return kept[-1]

        model._get_logits_processor = note
        return generate(*given, **options)

    model.generate = watched
    scope = {"model": model, "tokenizer": tokenizer, "prompts": ["ab", "cdefg"], "G": 2}
    scope["reward_of"] = lambda text: float(len(text))
    exec(loops.blocks("docs/loop.md")[0], scope)
    assert kept == [[]], "nothing may change what is sampled"
    assert scope["prompt_mask"].sum(1).tolist() == [2, 2, 5, 5]
    given = {"ref_model": model, "optimizer": loops.Recorder(model), "num_iterations": 1}
    exec(loops.blocks("docs/loop.md")[1], scope | given)
    assert "'clip_fraction_low'" in capsys.readouterr().out


def test_the_loop_of_the_readme_prints_what_it_says(capsys):
    block = loops.blocks("README.md")[1]
    exec(block, {})
    first, second = re.search(r"# (loss .*); then loss (\S+), ", block).groups()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == first
    assert printed[1].startswith(f"loss {second}, 46 tokens, ")


def test_data_reward_and_commands_of_the_start(tmp_path, monkeypatch, capsys):
    """They run unchanged, except the model, which has to be downloaded, and the number of steps."""
    text = (loops.ROOT / "docs" / "start.md").read_text()
    rows = re.search(r"```json\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "problems.jsonl").write_text(rows * 2)
    (tmp_path / "my_rewards.py").write_text(loops.blocks("docs/start.md")[1])
    model, tokenizer = loops.llama(), character_tokenizer("What is 12+34?=870")
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("my_rewards", None)  # of another test
    monkeypatch.setattr(sys, "path", [*sys.path])
    (training,) = re.findall(r"^grpo-fast (train --model .*)$", text, re.MULTILINE)
    assert training.count("Qwen/Qwen3-0.6B-Base") == 1
    more = " --steps 1 --max_new_tokens 3 --samples 0"
    assert main([*training.replace("Qwen/Qwen3-0.6B-Base", "model").split(), *more.split()]) == 0
    assert main(["eval", "runs/problems"]) == 0
    sys.modules.pop("my_rewards")
    assert "accuracy" in capsys.readouterr().out
    written = json.loads((tmp_path / "runs/problems/metrics.jsonl").read_text().splitlines()[0])
    page = (loops.ROOT / "docs" / "metrics.md").read_text()
    loss, *_, own = (re.findall(r"^\| `(\S+)` \|", x, re.M) for x in page.split("\n## ")[1:])
    renamed = {"reward/contains" if name == "reward/<function>" else name for name in own}
    only_with_a_server = {"mismatch_kl", "mismatch_ratio_max"}
    assert written.keys() == (renamed | set(loss)) - {"skipped_fraction"} - only_with_a_server


def test_every_block_of_a_page_is_run():
    pages = [*loops.ROOT.glob("*.md"), *loops.ROOT.glob("docs/**/*.md")]
    pages += [*loops.ROOT.glob("benchmarks/*.md"), *loops.ROOT.glob("kernels/*.md")]
    assert not NEED_THE_TRAINER.keys() & ELSEWHERE.keys()
    for path in pages:
        name = path.relative_to(loops.ROOT).as_posix()
        known = (ELSEWHERE | NEED_THE_TRAINER).get(name, 0) + (name in LOOPS)
        assert len(loops.blocks(name)) == known, f"{name}: which test runs its blocks?"
