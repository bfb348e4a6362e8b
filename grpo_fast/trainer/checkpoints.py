"""Checkpoints: the weights, and everything else that a run needs to go on as if it had not stopped.

A checkpoint is a folder that transformers (or peft) loads. Beside the weights it has the state of the
training in `training_state.json` and `training_state-<rank>.safetensors`: optimizer, schedule, random
numbers, and the position in the data. Nothing in it is a pickle.
"""

import contextlib
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from grpo_fast.checks import is_dtensor
from grpo_fast.trainer import files
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.parallel import Team, is_sharded
from grpo_fast.trainer.update import Learner

STATE = "training_state"


def save(
    policy: Policy,
    run_dir: Path,
    step: int,
    keep: int,
    learner: Learner | None = None,
    progress: dict[str, Any] | None = None,
) -> Path:
    """Write `checkpoints/step-<step>` completely or not at all, and delete all but the newest `keep`.

    If the disk is full, the checkpoints that would be deleted afterwards are deleted first, and the write is
    repeated once. The newest one always stays, and the newest one from which the run can go on. All processes
    of a run call it; they share the folder.

    Args:
        learner: its state is saved, too; None: before GRPO.
        progress: what else `restore` shall return, as JSON.

    Raises:
        OSError: nothing was saved; the message names the folder.
    """
    folder, team = run_dir / "checkpoints", learner.team if learner else Team(policy.device)

    def write() -> Path:
        return _write(policy, folder, step, team, learner, progress or {})

    try:
        final = write()
    except OSError as error:
        if error.errno not in files.FULL:
            raise

        def make_room() -> None:
            for spare in checkpoints(run_dir)[: -max(keep - 1, 1)]:
                if spare not in resumable(run_dir)[-1:]:
                    files.remove(spare)

        team.on_main(make_room)
        final = write()
    try:
        for old in checkpoints(run_dir)[:-keep] if team.main else ():
            if old not in (final, *resumable(run_dir)[-1:]):
                files.remove(old)
    except OSError as error:
        print(f"{folder}: could not delete an older checkpoint: {error}", file=sys.stderr)
    return final


def _write(
    policy: Policy,
    folder: Path,
    step: int,
    team: Team,
    learner: Learner | None,
    progress: dict[str, Any],
) -> Path:
    """Write one checkpoint; nothing of it stays if that fails."""
    final = folder / f"step-{step:06d}"
    partial = files.hidden(final, "partial")

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files.tidy(folder)
        partial.mkdir()

    def fill() -> None:
        if learner is not None:
            _write_state(learner, partial, progress | {"step": step})

    try:
        team.on_main(begin)
        write_model(policy, partial, team)
        team.together(fill)
        team.on_main(lambda: files.publish(partial, final))
    except Exception as error:  # OSError, or the errors of safetensors and tokenizers
        if team.main:
            with contextlib.suppress(OSError):
                files.tidy(folder)
        raise files.named(error, final) from error
    return final


def write_model(policy: Policy, folder: Path, team: Team) -> None:
    """Write weights, or the adapter, with tokenizer and settings. All processes of a run call it."""
    weights: dict[str, Any] | None = None
    if is_sharded(policy.model):
        everything = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(policy.model, options=everything)

    def write() -> None:
        model = policy.model
        if weights is None:
            model.save_pretrained(folder)
        else:
            model.save_pretrained(folder, state_dict=weights)
        policy.tokenizer.save_pretrained(folder)
        # Not through save_pretrained, which refuses settings that models on the hub have.
        policy.generation_config.to_json_file(folder / "generation_config.json")

    team.on_main(write)


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first.

    If a process died while it replaced one, the old one counts, which still has its hidden name.
    """
    found = {}
    for path in (run_dir / "checkpoints").glob("*"):
        name = re.fullmatch(r"step-(\d{6,})|\.step-(\d{6,})\.old", path.name)
        if name and path.is_dir() and not (name[2] and int(name[2]) in found):
            found[int(name[1] or name[2])] = path
    return [found[step] for step in sorted(found)]


def latest(run_dir: Path) -> Path:
    """Return the newest checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    found = checkpoints(run_dir)
    if not found:
        raise ValueError(f"{run_dir}: not a run with a checkpoint")
    return found[-1]


def chosen(where: Path) -> tuple[Path, Path]:
    """Return a checkpoint, and the folder of its run, which has the options of the run.

    Args:
        where: the checkpoint itself, or the folder of the run, whose newest one is meant.

    Raises:
        ValueError: it is neither.
    """
    given = any((where / f"{kind}config.json").is_file() for kind in ("", "adapter_"))
    checkpoint = where if given else latest(where)
    folder = checkpoint.resolve().parent.parent
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{where}: not a run or a checkpoint of one: {folder} has no config.yaml")
    return checkpoint, folder


def resumable(run_dir: Path) -> list[Path]:
    """Return the checkpoints from which a run can go on, the oldest first."""
    return [path for path in checkpoints(run_dir) if (path / f"{STATE}.json").is_file()]


def _write_state(learner: Learner, folder: Path, progress: dict[str, Any]) -> None:
    """Write the state of this process; without shared weights the main process has that of all."""
    team = learner.team
    if not (team.main or learner.sharded):
        return
    tensors, numbers = _optimizer_state(learner)
    found = dict(random_states())
    tensors |= {f"random.{name}": x for name, x in found.items() if isinstance(x, Tensor)}
    others = {name: x for name, x in found.items() if not isinstance(x, Tensor)}
    save_file(_apart(tensors), folder / f"{STATE}-{team.rank:05d}.safetensors")
    if team.main:
        state = {
            **progress,
            "updates": learner.updates,
            "scheduler": learner.scheduler.state_dict(),
            "optimizer": numbers,
            "random": others,
            "processes": team.size if learner.sharded else None,
        }
        (folder / f"{STATE}.json").write_text(json.dumps(state, default=float))


def restore(learner: Learner, checkpoint: Path) -> dict[str, Any]:
    """Give a learner the state of a checkpoint, and return the `progress` that was saved with it.

    The weights of the policy must be those of the checkpoint already.

    Raises:
        ValueError: the checkpoint does not fit; the message says why.
    """
    state = json.loads((checkpoint / f"{STATE}.json").read_text())
    team = learner.team
    if state["processes"] not in (None, team.size) or (
        learner.sharded and state["processes"] is None
    ):
        before = state["processes"]
        by = (
            f"by {before} processes that share them" if before else "by a process that has them all"
        )
        raise ValueError(
            f"resume: the optimizer state of {checkpoint} was written {by}, and this run has {team.size}: it "
            "cannot be dealt out anew. --model starts a new run from the weights"
        )
    rank = team.rank if learner.sharded else 0
    tensors = _read(checkpoint / f"{STATE}-{rank:05d}.safetensors")
    _restore_optimizer(learner, tensors, state["optimizer"])
    schedule: Any = learner.scheduler
    schedule.load_state_dict(state["scheduler"])
    # The schedule may be that of another number of steps now.
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    schedule._last_lr = rates
    for group, rate in zip(learner.optimizer.param_groups, rates, strict=True):
        _set_rate(group, rate)
    learner.updates = state["updates"]
    restore_random(tensors, state["random"])
    return state


def _read(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors.

    Raises:
        ValueError: it is none.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"resume: {path}: {error}") from error


def _optimizer_state(learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of the optimizer: tensors and numbers, by `<parameter>.<name>`; and float32 copies."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for i, p in enumerate(learner.parameters):
        if learner.masters or learner.sharded:
            tensors[f"{i}.weight"] = _local(p.detach())
        for name, value in learner.optimizer.state[p].items():
            if isinstance(value, Tensor):
                tensors |= {f"{i}.{name}{key}": x for key, x in _pieces(value)}
            else:
                numbers[f"{i}.{name}"] = value
    return tensors, numbers


@torch.no_grad()
def _restore_optimizer(
    learner: Learner, tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    """Copy a saved state into the optimizer, which a step with gradients of 0 makes first."""
    optimizer = learner.optimizer
    kept = [p.detach().clone() for p in learner.parameters]
    for group in optimizer.param_groups:
        _set_rate(group, 0.0)
    for p in learner.parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    used = set()
    for i, p in enumerate(learner.parameters):
        p.copy_(kept[i])
        if f"{i}.weight" in tensors:
            _local(p).copy_(tensors[f"{i}.weight"])
            used.add(f"{i}.weight")
        for name, value in optimizer.state[p].items():
            if not isinstance(value, Tensor):
                optimizer.state[p][name] = numbers.get(f"{i}.{name}", value)
                continue
            for key, piece in _pieces(value):
                saved = tensors.get(f"{i}.{name}{key}")
                if saved is None or saved.shape != piece.shape:
                    raise ValueError(
                        f"resume: the checkpoint has no {name} of parameter {i} with shape "
                        f"{tuple(piece.shape)}: it is of another model or optimizer"
                    )
                piece.copy_(saved)
                used.add(f"{i}.{name}{key}")
    unused = sorted(name for name in tensors.keys() - used if not name.startswith("random."))
    if unused:
        raise ValueError(
            f"resume: the checkpoint has state that this optimizer has not: {', '.join(unused[:3])}"
        )
    if learner.masters:
        learner.masters.publish()


def _set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a learning rate, which some optimizers keep in a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _local(x: Any) -> Tensor:
    return x.to_local() if is_dtensor(x) else x


def _pieces(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors of a state, which may be shared between processes or in 8 bits."""
    value = _local(value)
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            for key, piece in _pieces(getattr(value, name)):
                yield f"/{name}{key}", piece
    else:
        yield "", value


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU, none of which shares its memory with another."""
    seen: set[int] = set()
    apart = {}
    for name, x in tensors.items():
        x = x.detach().cpu().contiguous()
        pointer = x.untyped_storage().data_ptr()
        apart[name] = x.clone() if pointer in seen else x
        seen.add(pointer)
    return apart


def random_states() -> Iterator[tuple[str, Any]]:
    """Yield the states of the generators of Python, NumPy and PyTorch by name."""
    version, words, gauss = random.getstate()
    yield "python", [version, list(words), gauss]
    kind, keys, *rest = np.random.get_state(legacy=True)
    yield "numpy", [kind, keys.tolist(), *rest]  # type: ignore[union-attr]
    yield "torch", torch.get_rng_state()
    if torch.cuda.is_available():
        for i, state in enumerate(torch.cuda.get_rng_state_all()):
            yield f"cuda.{i}", state


def restore_random(tensors: dict[str, Tensor], others: dict[str, Any]) -> None:
    """Set the generators to the states that `random_states` gave."""
    version, words, gauss = others["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(others["numpy"]))
    torch.set_rng_state(tensors["random.torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"random.cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"random.cuda.{i}"], i)
