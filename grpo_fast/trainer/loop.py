"""`Run`: warm up a new model, then sample, reward and update until done or interrupted."""

import contextlib
import dataclasses
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grpo_fast.trainer import checkpoints, evaluate, files, progress, runs, tasks
from grpo_fast.trainer import model as models
from grpo_fast.trainer import rollout as rollouts
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.interruption import Interruption, undivided
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.parallel import Team
from grpo_fast.trainer.results import short
from grpo_fast.trainer.rewards import Scores, text_of
from grpo_fast.trainer.rollout import Rollout, Sampler, ServerSampler
from grpo_fast.trainer.tasks import Task
from grpo_fast.trainer.update import Learner
from grpo_fast.trainer.warmup import warm_up

LOGGED = 16  # completions of a step in completions.jsonl, at most
PRINTED = 4  # completions of a step in a table


@dataclass
class Run:
    """A run: its parts, and how far it is."""

    config: TrainConfig
    task: Task
    policy: Policy
    run_dir: Path
    team: Team
    started: float
    step: int = 0
    position: int = 0  # in the data: how many prompts were taken
    before: float = 0.0  # seconds of the processes that this one goes on from
    saved: tuple[int, Path] | None = None  # optimiser steps, and where
    process: int = dataclasses.field(default_factory=os.getpid)
    ready: bool = False  # the weights are those of `step`, and worth a checkpoint
    warm: bool = True  # the warm-up was not interrupted
    signal: int | None = None  # that ended the run before all its steps

    def __post_init__(self) -> None:
        self.learner: Learner | None = None
        self.sampler = Sampler(self.policy, self.config)
        self.order = tasks.Order(self.task.train, self.config.seed)
        self.metrics = runs.Lines(self.run_dir / "metrics.jsonl")
        self.completions = runs.Lines(self.run_dir / "completions.jsonl", remember=False)

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.team.main:
            print(text, flush=True)

    def whole(self, interruption: Interruption, checkpoint: Path | None) -> None:
        """Make all of the run, from its start or from a checkpoint."""
        config, task = self.config, self.task
        if config.model and config.dataset is None and config.task == "arithmetic":
            self.say(
                f"no --dataset: {config.model} is trained on the built-in task {config.task!r}"
            )
        counts = f"{len(task.train)} training and {len(task.heldout)} held-out problems"
        self.say(f"{self.run_dir}: {counts}")
        trackers, self.ready = None, checkpoint is None
        try:
            self.begin(interruption, checkpoint)
            self.ready = True
            trackers = progress.Trackers(config, self.run_dir, self.policy.device)
            if not self.stop(interruption):
                if checkpoint is None:
                    self.show("before GRPO")
                self.grpo(interruption, trackers)
            self.save()
            self.draw()
            if self.signal is None:
                self.show("after GRPO")
        except BaseException as error:
            if self.ready:
                self.rescue(error)
                if isinstance(error, ValueError):
                    # No option is wrong any more: let its traceback be seen.
                    raise RuntimeError(f"step {self.step}: {error}") from error
            raise
        finally:
            if trackers is not None:
                trackers.end()
        rows = self.metrics.rows if self.team.main else []
        if rows and all(r["groups_without_signal"] == 1 for r in rows):
            print(
                "warning: in no group did completions earn different rewards: nothing was learned from them",
                file=sys.stderr,
            )

    def begin(self, interruption: Interruption, checkpoint: Path | None) -> None:
        """Warm up a new model, or go on from a checkpoint; make the learner and the sampler."""
        config, reference = self.config, None
        frozen = self.run_dir / "reference"
        if checkpoint is not None:
            if config.to_objective().beta and not config.use_peft:
                here = dataclasses.replace(config, device=str(self.policy.device))
                source = frozen if frozen.is_dir() else None
                if source is None and config.model is None:
                    raise ValueError(
                        f"resume: {frozen} is gone: it had the model before GRPO, to which the KL is measured"
                    )
                reference = models.build(here, self.task.alphabet, source).model.requires_grad_(
                    False
                )
        elif config.model is None and self.task.demonstration is not None:
            taken = warm_up(
                self.policy, self.task, config, lambda: self.stop(interruption), self.team
            )
            self.say(f"warm-up: {taken} steps, {time.perf_counter() - self.started:.0f} s")
            self.warm = not self.stop(interruption)
        self.team.alike(self.policy.trained)
        if (
            checkpoint is None
            and config.to_objective().beta
            and (config.model is None or config.dry_run)
        ):
            self.write_weights(frozen)  # it is found nowhere else
        self.learner = Learner(self.policy, config, self.team, reference)
        if config.server:
            folder = self.run_dir / "server_weights"
            self.sampler = ServerSampler(self.policy, config, folder)
        if checkpoint is not None:
            state = checkpoints.restore(self.learner, checkpoint)
            self.step, self.position, self.before = (
                state[k] for k in ("step", "position", "seconds")
            )
            self.saved = self.learner.updates, checkpoint
            self.say(f"resumed after step {self.step} from {checkpoint}")
        if self.team.main:
            self.metrics.go_on(self.step)
            self.completions.go_on(self.step)
        self.sampler.update(self.write_weights, self.team)

    def write_weights(self, folder: Path) -> None:
        """Write the model, or the adapter, completely or not at all. All processes call it."""
        partial = files.hidden(folder, "partial")

        def clear() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()

        self.team.on_main(clear)
        checkpoints.write_model(self.policy, partial, self.team)
        self.team.on_main(lambda: files.publish(partial, folder))

    def stop(self, interruption: Interruption) -> bool:
        """Tell whether a signal ends the run; all processes agree."""
        signals = [s for s in self.team.objects(interruption.signal) if s is not None]
        if signals:
            self.signal = signals[0]
        return bool(signals)

    def save(self) -> Path:
        """Write a checkpoint of the current weights, unless there is one, and return it."""
        updates = self.learner.updates if self.learner else 0
        if self.saved is None or self.saved[0] != updates:
            # A run does not go on from a step that failed in the middle, or has no row of metrics, nor
            # from a part of the warm-up.
            complete = self.warm and updates == self.step * self.config.num_iterations
            if self.team.main and self.step:
                rows = self.metrics.rows
                complete = complete and bool(rows) and rows[-1]["step"] == self.step - 1
            complete = all(self.team.objects(complete))
            if not complete:
                self.say(
                    "the next checkpoint has weights alone; the run goes on from the one before"
                )
            state = {
                "position": self.position,
                "seconds": self.before + time.perf_counter() - self.started,
            }
            with undivided():
                path = checkpoints.save(
                    self.policy,
                    self.run_dir,
                    self.step,
                    self.config.keep_checkpoints,
                    self.learner if complete else None,
                    state,
                )
                self.saved = updates, path
        return self.saved[1]

    def draw(self) -> None:
        if self.team.main:
            runs.plot(self.metrics.rows, self.run_dir / "curve.png")

    def rescue(self, error: BaseException) -> None:
        """Save the weights of a run that ends by an exception, and say where they are.

        It does nothing in a child that a reward function has forked: the run itself goes on. Of several
        processes all have to take part: they do if all have raised the error together.
        """
        if os.getpid() != self.process:
            return
        found = checkpoints.checkpoints(self.run_dir)
        newest = f"the newest checkpoint is {found[-1] if found else 'none'}"
        if self.team.size > 1 and error is not self.team.agreed:
            self.say(newest)
            return
        with contextlib.suppress(OSError, KeyboardInterrupt), undivided():
            try:
                print(f"the weights after step {self.step} are in {self.save()}", file=sys.stderr)
            except Exception as error:  # must not hide the one that ended the run
                why = files.reason(error) if isinstance(error, OSError) else error
                print(
                    f"the weights after step {self.step} could not be saved: {why}; {newest}",
                    file=sys.stderr,
                )
            self.draw()

    def grpo(self, interruption: Interruption, trackers: progress.Trackers) -> None:
        """Make all GRPO steps. `self.step` counts the finished ones."""
        config = self.config
        with progress.Bar("GRPO", config.steps, self.step, self.team.main) as bar:
            while self.step < config.steps and not self.stop(interruption):
                row = self.grpo_step()
                if self.team.main:
                    trackers.log(row)
                bar.advance(progress.line_of(row))
                if self.step % config.save_steps == 0 and self.step < config.steps:
                    self.save()
                    self.draw()

    def grpo_step(self) -> dict[str, float]:
        """Sample `group_size` completions per problem, reward them, update; write and return the metrics."""
        assert self.learner is not None
        begin = time.perf_counter()
        rows, rollout, scores, batches = self.collect()
        sampled = time.perf_counter()
        step = self.step
        with undivided():  # the weights after a whole step have its name, and its row is written
            try:
                metrics = self.learner.update(rollout, scores.total)
                self.step += 1
                self.position += batches * self.config.prompts_per_step
            except FloatingPointError as error:
                # The loss is that of all processes, and so all are here.
                self.team.agreed = FloatingPointError(f"step {step}: {error}; the run ends here")
                raise self.team.agreed from error
            updated = time.perf_counter()
            measured = self.measured(rollout, scores)
            if self.config.completions_steps and step % self.config.completions_steps == 0:
                self.log_completions(step, rows, rollout, scores)
            row = {
                "step": step,
                **measured,
                **metrics,
                "batches_sampled": batches,
                "tokens_per_second": measured["tokens"] / (updated - begin),
                "sampling_seconds": sampled - begin,
                "update_seconds": updated - sampled,
                "step_seconds": time.perf_counter() - begin,
                "memory_gib": max(self.team.objects(memory(self.policy.device))),
                "seconds": self.before + time.perf_counter() - self.started,
            }
            if self.team.main:
                self.metrics.write(row)
        self.sampler.update(self.write_weights, self.team)
        return row

    def collect(self) -> tuple[list[tasks.Row], Rollout, Scores, int]:
        """Return the problems of a step, their completions and rewards, and how many batches were sampled.

        With `resample`, groups without signal are replaced by groups of further batches, as in DAPO.
        """
        config, team = self.config, self.team
        share = config.prompts_per_step // team.size
        found: list[tuple[list[tasks.Row], Rollout, Scores]] = []
        for attempt in range(1 + config.resample):
            position = self.position + attempt * config.prompts_per_step + team.rank * share
            problems = self.order.take(position, share)
            rows = [row for row in problems for _ in range(config.group_size)]
            first = team.rank * share * config.group_size
            seeds = [
                rollouts.seed_of(config.seed, self.step, attempt, first + b)
                for b in range(len(rows))
            ]
            found.append((rows, *team.together(lambda r=rows, s=seeds: self.answered(r, s))))  # type: ignore[misc]
            totals = torch.cat([scores.total for _, _, scores in found])
            missing = share - int((~silent(totals, config.group_size)).sum())
            if not config.resample or team.most(missing) <= 0:
                break
        if len(found) == 1:
            return (*found[0], 1)
        quiet = silent(totals, config.group_size)
        groups = sorted([*(~quiet).nonzero()[:, 0], *quiet.nonzero()[:, 0]][:share])
        G = config.group_size
        picked = torch.cat([torch.arange(int(g) * G, int(g) * G + G) for g in groups])
        every = [row for rows, _, _ in found for row in rows]
        rollout = rollouts.joined([r for _, r, _ in found], self.policy.tokenizer.pad_token_id)
        scores = Scores(
            totals[picked],
            {
                name: torch.cat([s.each[name] for _, _, s in found])[picked]
                for name in found[0][2].each
            },
            sum(s.failures for _, _, s in found),
        )
        return [every[int(b)] for b in picked], rollout[picked], scores, len(found)

    def answered(self, rows: list[tasks.Row], seeds: list[int]) -> tuple[Rollout, Scores]:
        """Sample one completion for each of `rows`, and reward it."""
        rollout = self.sampler.sample([row["prompt"] for row in rows], seeds)
        return rollout, rollouts.reward(self.task, rollout, rows, self.config.reward_timeout)

    def measured(self, rollout: Rollout, scores: Scores) -> dict[str, float]:
        """Return the metrics of the completions of all processes."""
        gathered = self.team.objects(
            (
                scores.total,
                scores.each,
                scores.failures,
                rollout.mask.sum(1).cpu(),
                rollout.ended.cpu(),
            )
        )
        totals, each, failures, lengths, ended = zip(*gathered, strict=True)
        rewards, tokens = torch.cat(totals), torch.cat(lengths).float()
        means = {name: torch.cat([e[name] for e in each]).nanmean().item() for name in scores.each}
        return {
            "reward": rewards.nanmean().item(),
            "reward_std": spread(rewards),
            **{f"reward/{name}": mean for name, mean in means.items()},
            "without_reward": rewards.isnan().float().mean().item(),
            "reward_failures": sum(failures),
            "groups_without_signal": silent(rewards, self.config.group_size).float().mean().item(),
            "completion_length": tokens.mean().item(),
            "completion_length_max": tokens.max().item(),
            "truncated": 1 - torch.cat(ended).float().mean().item(),
            "tokens": tokens.sum().item(),
        }

    def log_completions(
        self, step: int, rows: list[tasks.Row], rollout: Rollout, scores: Scores
    ) -> None:
        """Print a table of completions, and write more of them to completions.jsonl."""
        if not self.team.main:
            return
        G = self.config.group_size
        assert self.learner is not None
        assert self.learner.advantages is not None
        advantages = self.learner.advantages.cpu()
        lengths = rollout.mask.sum(1).tolist()
        found = []
        for b in range(min(len(rows), max(G, LOGGED // G * G))):
            one = {
                "step": step,
                "prompt": rollout.prompts[b],
                "completion": text_of(rollout.completions[b]),
                "reward": _or_none(scores.total[b]),
                "advantage": _or_none(advantages[b]),
                "rewards": {name: _or_none(x[b]) for name, x in scores.each.items()},
                "tokens": lengths[b],
                "ended": bool(rollout.ended[b]),
            }
            if "answer" in rows[b]:
                one["answer"] = str(rows[b]["answer"])
            found.append(one)
        self.completions.write(*found)
        progress.table(step, found[:PRINTED])

    def show(self, when: str) -> None:
        """Print accuracy on the held-out problems and a few answers to them."""
        config = self.config
        self.say(f"{when}: {evaluate.report(self.policy, self.task, config)}")
        rows = self.task.heldout[: config.samples]
        if not rows:
            return
        seeds = [rollouts.seed_of(config.seed, when, b) for b in range(len(rows))]
        answers = Sampler(self.policy, config).sample([row["prompt"] for row in rows], seeds)
        scores = rollouts.reward(self.task, answers, rows, config.reward_timeout)
        for prompt, answer, value in zip(
            answers.prompts, answers.completions, scores.total.tolist(), strict=True
        ):
            self.say(f"  {short(prompt)} -> {short(answer)}  reward {value:.2f}")


def memory(device: torch.device) -> float:
    """Return the most memory this process has had, in GiB: on its GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes / (2**30 if sys.platform == "darwin" else 2**20)


def _or_none(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else value.item()


def spread(rewards: Tensor) -> float:
    """Return the standard deviation of the rewards that are not missing; NaN for fewer than two."""
    known = rewards[~rewards.isnan()]
    return known.std().item() if len(known) > 1 else math.nan


def silent(rewards: Tensor, group_size: int) -> Tensor:
    """Tell which groups have rewards that are all equal (or missing, NaN): nothing is learned there."""
    groups = rewards.view(-1, group_size)
    lowest, highest = groups.nan_to_num(math.inf).amin(1), groups.nan_to_num(-math.inf).amax(1)
    return lowest >= highest
