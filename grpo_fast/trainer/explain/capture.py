"""The capture of a step: the next one of a run, on the completions of one prompt, by the trainer's own parts.

Nothing is written: the weights that the updates change are in memory alone.
"""

import contextlib
import dataclasses
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

import grpo_fast
from grpo_fast.trainer import checkpoints, evaluate, parsing, rollout, tasks
from grpo_fast.trainer import model as models
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.explain import numbers
from grpo_fast.trainer.explain.record import (
    FORMAT,
    Completion,
    Message,
    Source,
    StepRecord,
    Update,
)
from grpo_fast.trainer.forward import MicroBatch
from grpo_fast.trainer.loop import silent
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.rewards import Scores, names, text_of
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.tasks import Row, Task
from grpo_fast.trainer.update import Learner

UPDATES = 3  # optimiser steps on the completions: in the first one every ratio is 1
TRIES = 32  # prompts that are sampled in search of a group whose rewards differ
BEFORE = "the model before GRPO"
AT_START = "the policy before this step (the run kept no model before GRPO)"


class Place(NamedTuple):
    """The checkpoint that a step goes on from.

    Attributes:
        step, position: how many steps and prompts its run had taken.
        stateful: it has the state of an optimizer that one process can load.
    """

    checkpoint: Path
    folder: Path
    step: int
    position: int
    stateful: bool


class Group(NamedTuple):
    """The completions of one prompt, with the seeds of their random numbers."""

    row: Row
    seeds: list[int]
    rollout: Rollout
    scores: Scores


class Watched(Learner):
    """A learner that looks at one group before and after each update, and keeps what it sees.

    Attributes:
        logps: of the group's tokens, before the first update and after each.
        again: completions of the same prompt, after each update.
        reports: what each update reports.
    """

    def watch(self, group: Group, task: Task) -> None:
        """Begin; call it once the weights are those of the checkpoint."""
        self.group, self.task = group, task
        self.logps: list[list[list[float]]] = []
        self.again: list[list[Completion]] = []
        self.reports: list[Update] = []
        unused = torch.zeros(len(group.seeds), device=self.policy.device)
        self.whole = self.forward.micro_batch(group.rollout, unused)

    def score(self, model: Any) -> list[list[float]]:
        """Return the log-probs of the tokens of each completion."""
        found = self.forward.log_probs(model, self.whole).float()
        pairs = zip(found, self.group.rollout.mask, strict=True)
        return [row[live].tolist() for row, live in pairs]

    def look(self) -> None:
        """Keep the log-probs, and once there was an update new completions."""
        self.logps.append(self.score(self.policy.model))
        if self.reports:
            row, seeds = self.group.row, self.group.seeds
            found = sampled(self.policy, self.task, self.config, row, seeds)
            self.again.append(completions(self.policy, *found))

    def backward(self, micro_batches: list[MicroBatch], counts: Any) -> tuple[float, float, Tensor]:
        self.look()
        loss, norm, statistics = super().backward(micro_batches, counts)
        self.reports.append(Update(loss, norm))
        return loss, norm, statistics


def capture(
    where: Path, updates: int | None = None, device: str = "auto", tries: int = TRIES
) -> StepRecord:
    """Make the next step of a run on one prompt, and return its record; the run's folder is only read.

    The prompt is the first one of the run's next prompts whose completions earn different rewards. The
    completions are those that the run itself would sample. The learning rate is the highest of the schedule.

    Args:
        where: the folder of a run, whose newest checkpoint is taken, or a checkpoint.
        updates: optimiser steps on the completions, at least the run's `num_iterations`; None: 3, or that.
        tries: prompts that are sampled in search of one.

    Raises:
        ValueError: it is no run with a checkpoint, its objective is not explained, it makes more updates, or
            the rewards differ in no group; the message says which.
        FloatingPointError: a loss or a gradient is not finite.
    """
    place, config = find(where.expanduser())
    own = config.num_iterations
    if updates is not None and updates < own:
        raise ValueError(f"updates: want at least {own}, as many as the run makes, got {updates}")
    numbers.check(config.to_objective(), config.objective)
    here = dataclasses.replace(
        config,
        device=device,
        server=None,
        fsdp=False,
        num_iterations=max(UPDATES, own) if updates is None else updates,
        lr_scheduler="constant",
        resume=None,
    )
    transformers.set_seed(config.seed)  # for reward functions that draw numbers
    with threads(config), contextlib.redirect_stdout(sys.stderr):
        print(f"{place.checkpoint}: {here.num_iterations} updates on one prompt, in memory")
        if config.server:
            print(f"the model itself samples here, and not the server {config.server}")
        task = tasks.build(here)
        before = base_of(here, place, task)
        policy = models.build(here, task.alphabet, place.checkpoint)
        rollout.check_prompts(policy, task.train, config.max_new_tokens)
        learner = Watched(policy, here, reference=before)
        if place.stateful:
            checkpoints.restore(learner, place.checkpoint)
        learner.watch(find_group(policy, task, here, place, tries), task)
        ref_logps = reference_of(learner, before)
        del before  # without a KL nothing else holds it
        gc.collect()
        learner.update(learner.group.rollout, learner.group.scores.total)
        learner.look()
    return record_of(learner, config, place, ref_logps)


def find(where: Path) -> tuple[Place, TrainConfig]:
    """Return the checkpoint that `where` is or has, and the options of its run.

    Raises:
        ValueError: there is none.
    """
    checkpoint, folder = checkpoints.chosen(where)
    checkpoint = checkpoint.resolve()
    config = parsing.parse([str(folder / "config.yaml")])
    step = int("".join(filter(str.isdigit, checkpoint.name)) or 0)
    state: dict[str, Any] = {"position": step * config.prompts_per_step, "processes": 1}
    if (path := checkpoint / f"{checkpoints.STATE}.json").is_file():
        state = {"processes": None, **json.loads(path.read_text())}
    stateful = state["processes"] is None  # None: one process has all of it
    return Place(checkpoint, folder, step, state["position"], stateful), config


@contextlib.contextmanager
def threads(config: TrainConfig) -> Iterator[None]:
    """Compute with the threads of the run, as in training: the bits of a sum depend on their number."""
    usual = torch.get_num_threads()
    torch.set_num_threads(models.threads(config))
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def base_of(config: TrainConfig, place: Place, task: Task) -> Any:
    """Return the model before GRPO, frozen; None with an adapter, or where the run has not kept it.

    Raises:
        ValueError: the loss needs it, and the run has not kept it.
    """
    if config.use_peft:
        return None
    try:
        source = evaluate.source_of_base(config, place.folder)
    except ValueError:
        if config.to_objective().beta:
            raise
        return None
    return models.build(config, task.alphabet, source).model.requires_grad_(False)


def find_group(policy: Policy, task: Task, config: TrainConfig, place: Place, tries: int) -> Group:
    """Sample the next prompts of a run one by one, and return the first group whose rewards differ.

    Raises:
        ValueError: there is none among `tries` prompts.
    """
    order = tasks.Order(task.train, config.seed)
    G = config.group_size
    missing = 0
    for i in range(tries):
        batch, number = divmod(i, config.prompts_per_step)
        row = order.at(place.position + i)
        # As in the run: a completion depends on the step and its place in the batch alone.
        seeds = [
            rollout.seed_of(config.seed, place.step + batch, 0, number * G + b) for b in range(G)
        ]
        found = Group(row, seeds, *sampled(policy, task, config, row, seeds))
        if found.scores.total.isnan().any():
            missing += 1
        elif not silent(found.scores.total, G).item():
            return found
    raise ValueError(
        f"{place.checkpoint}: in none of the next {tries} prompts of the run do the {G} completions earn "
        f"different rewards ({missing} had missing ones), so that no step would learn from them: take an "
        "earlier checkpoint"
    )


def sampled(
    policy: Policy, task: Task, config: TrainConfig, row: Row, seeds: list[int]
) -> tuple[Rollout, Scores]:
    """Sample a completion of a prompt for each seed, as the run does, and reward it."""
    rows = [row] * len(seeds)
    return evaluate.answered(policy, task, rows, config, config.temperature, seeds)


def reference_of(learner: Watched, before: Any) -> list[list[float]] | None:
    """Return the log-probs of the group by the model before GRPO; None: there is no such model."""
    if learner.policy.adapted:
        with learner.policy.without_adapter() as model:
            return learner.score(model)
    return None if before is None else learner.score(before)


def record_of(
    learner: Watched, config: TrainConfig, place: Place, ref_logps: list[list[float]] | None
) -> StepRecord:
    """Return the record of the updates that a learner has made."""
    policy, group = learner.policy, learner.group
    return StepRecord(
        format=FORMAT,
        source=source_of(config, learner.task, place, AT_START if ref_logps is None else BEFORE),
        objective=dataclasses.asdict(config.to_objective()),
        scale_rewards=config.scale_rewards,
        temperature=config.temperature,
        prompt=messages(group.row["prompt"]),
        answer=str(group.row["answer"]) if "answer" in group.row else None,
        completions=completions(policy, group.rollout, group.scores),
        logps=learner.logps,
        ref_logps=learner.logps[0] if ref_logps is None else ref_logps,
        updates=learner.reports,
        again=learner.again,
    )


def source_of(config: TrainConfig, task: Task, place: Place, reference: str) -> Source:
    """Describe where a step is from."""
    model, dataset = config.model or "a new model", config.dataset or config.task
    versions = {
        "grpo_fast": grpo_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return Source(
        run=place.folder.name,
        checkpoint=place.checkpoint.name,
        step=place.step,
        model=Path(model).name if Path(model).exists() else model,
        task=Path(dataset).name if Path(dataset).exists() else dataset,
        preset=config.objective,
        optimizer=config.optim,
        learning_rate=config.learning_rate,
        restored=place.stateful,
        prompts_per_step=config.prompts_per_step,
        num_iterations=config.num_iterations,
        reference=reference,
        reward_weights=dict(zip(names(task.rewards), task.weights, strict=True)),
        versions=versions,
    )


def messages(prompt: Any) -> list[Message]:
    """Return a prompt as messages."""
    if isinstance(prompt, str):
        return [Message("prompt", prompt)]
    return [Message(str(m["role"]), str(m["content"])) for m in prompt]


def completions(policy: Policy, found: Rollout, scores: Scores) -> list[Completion]:
    """Return completions with their tokens and rewards."""
    made = []
    for b, (ids, live) in enumerate(zip(found.completion_ids, found.mask, strict=True)):
        token_ids = ids[live].tolist()
        each = {name: x[b].item() for name, x in scores.each.items()}
        made.append(
            Completion(
                text=text_of(found.completions[b]),
                ended=bool(found.ended[b]),
                token_ids=token_ids,
                tokens=[policy.tokenizer.decode([i]) for i in token_ids],
                reward=scores.total[b].item(),
                rewards={name: None if x != x else x for name, x in each.items()},
            )
        )
    return made
