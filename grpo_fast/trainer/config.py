"""`TrainConfig`: the options of a training run, and what their values may be."""

import dataclasses
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from grpo_fast.integrations.shared.sharing import SharePrompts
from grpo_fast.objective import Objective
from grpo_fast.presets import PRESETS
from grpo_fast.spelling import closest, did_you_mean

# The defaults that depend on the model: of a new model, and with --model.
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "prompts_per_step": (32, 8),
    "max_new_tokens": (8, 256),
    "num_iterations": (2, 1),
    "micro_batch_tokens": (None, 16384),
    "sampling_tokens": (None, 65536),
    "learning_rate": (1e-3, 1e-6),
    "lr_warmup_steps": (10, 0),
}
TASKS = ("arithmetic", "countries")  # and reasoning_gym:NAME
QUESTIONS = ("capital", "continent", "currency")  # of the task countries
HELDOUT = 150  # held-out problems of the built-in task, and the most of a dataset (else a tenth)
Quantisation = Literal["bnb-4bit", "bnb-8bit", "torchao-int8"]


def default_text(name: str) -> str | None:
    """Return the documented text of a default that depends on other options; None for other defaults."""
    if name == "heldout":
        return f"{HELDOUT}; with `dataset` a tenth, at most {HELDOUT}"
    if name not in DEFAULTS:
        return None
    new, given = ("all" if value is None else value for value in DEFAULTS[name])
    return f"{new}; with `model` {given}"


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with the help text `text`."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class TrainConfig:
    """The options of `grpo-fast train`; `--help` and docs/trainer_options.md describe each.

    Raises:
        ValueError: a value is out of range, or a combination has no meaning; the message names the option.
    """

    # The task
    task: str = option(
        "arithmetic",
        "the task where no dataset is given: arithmetic, countries, or reasoning_gym:NAME",
    )
    questions: list[str] = dataclasses.field(
        default_factory=lambda: ["capital", "continent"],
        metadata={
            "help": "countries: kinds of questions, of capital, continent, currency; default: the first two"
        },
    )
    max_operand: int = option(29, "arithmetic: the largest operand; the smallest is 0")
    problems: int = option(1000, "reasoning_gym: number of problems that are generated")
    examples: int = option(3, "reasoning_gym: number of solved examples before each question")
    task_options: str | None = option(
        None,
        "reasoning_gym: options of the generator itself, as a YAML mapping such as '{min_words: 3}'",
    )
    dataset: str | None = option(
        None,
        "JSON Lines or Parquet file of prompts and answers, or the name of a dataset of the library "
        "datasets; default: the built-in task",
    )
    dataset_split: str = option("train", "split of a dataset that is given by name")
    reward: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "reward functions, each as module:function, correct, math_verify, or the folder "
            "or hub id of a reward model; they replace the task's own"
        },
    )
    reward_dir: str | None = option(
        None, "folder where the modules of reward are searched first; default: the current folder"
    )
    reward_weights: list[float] = dataclasses.field(
        default_factory=list,
        metadata={"help": "one weight per reward function; default: 1 each"},
    )
    reward_timeout: float = option(
        300.0,
        "seconds after which a call of a reward function is given up; its rewards are missing",
    )
    prompt_column: str = option("prompt", "column of the dataset with the prompts")
    answer_column: str = option("answer", "column of the dataset with the right answers")
    chat: bool = option(False, "put prompts that are text into a chat message of the user")
    system_prompt: str | None = option(None, "chat: a system message before that of the user")
    heldout: int = option(None, "number of problems that are kept out of training, for evaluation")
    # The model
    model: str | None = option(
        None, "folder or hub id of a causal language model; default: a small new one"
    )
    hidden_size: int = option(64, "hidden size of a new model")
    num_layers: int = option(2, "number of layers of a new model")
    num_heads: int = option(4, "number of attention heads of a new model")
    device: str = option(
        "auto", "device to train on: cpu, cuda, cuda:1, mps, ...; auto: cuda if there is one"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "precision of the activations; auto: bfloat16 on cuda if supported",
    )
    weights: Literal["auto", "float32", "bfloat16", "bfloat16_only"] = option(
        "auto",
        "precision of the weights; bfloat16 has a float32 copy in the optimizer, bfloat16_only has none; "
        "auto: that of dtype",
    )
    attention: str | None = option(
        None, "attention of transformers, e.g. sdpa or flash_attention_2; default: the model's"
    )
    use_peft: bool = option(False, "train a LoRA adapter (peft) and leave the weights as they are")
    lora_r: int = option(16, "LoRA: rank of the adapter's matrices")
    lora_alpha: float = option(32.0, "LoRA: the adapter's product is scaled by lora_alpha / lora_r")
    lora_target_modules: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "LoRA: layers that get an adapter; default: all linear ones but the head"
        },
    )
    quantize: Quantisation | None = option(  # noqa: RUF009  # it returns a field
        None, "LoRA: load the weights in this format of bitsandbytes or torchao"
    )
    gradient_checkpointing: bool = option(
        False, "recompute the activations in the backward pass, which saves memory"
    )
    # Supervised warm-up of a new model
    warmup_steps: int = option(
        600, "largest number of supervised steps before GRPO, for a new model; 0: none"
    )
    warmup_reward: float = option(0.36, "mean reward of sampled answers at which the warm-up ends")
    warmup_error_rate: float = option(
        0.5, "arithmetic: share of the warm-up's demonstrations that are wrong"
    )
    warmup_batch_size: int = option(128, "number of demonstrations per warm-up step")
    warmup_learning_rate: float = option(3e-3, "learning rate of the warm-up")
    # Sampling
    prompts_per_step: int = option(None, "P, the number of prompts per GRPO step")
    group_size: int = option(8, "G, the number of completions per prompt")
    max_new_tokens: int = option(None, "longest completion, in tokens")
    temperature: float = option(1.0, "temperature of the samples, and of the log-probs in the loss")
    sampling_tokens: int | None = option(
        None, "largest number of tokens, prompts included, of the completions sampled together"
    )
    resample: int = option(
        0, "largest number of further batches that are sampled to replace groups without signal"
    )
    server: str | None = option(
        None, "URL of an OpenAI-compatible server (vLLM) that samples; default: the model itself"
    )
    mismatch: Literal["truncate", "mask", "none"] = option(
        "truncate",
        "server: importance weight of a token: truncated at mismatch_cap, 0 above it, or 1",
    )
    mismatch_cap: float = option(2.0, "server: largest importance weight of a token")
    # Optimisation
    steps: int = option(200, "number of GRPO steps")
    num_iterations: int = option(None, "mu, the number of optimiser steps per batch of completions")
    micro_batch_tokens: int | None = option(
        None, "largest number of tokens in one forward pass, shared prompts counted once"
    )
    micro_batch_size: int | None = option(
        None, "largest number of completions in one forward pass, also in sampling"
    )
    share_prompts: SharePrompts = option(  # noqa: RUF009  # it returns a field
        "auto",
        "how completions share the forward of their prompt (unless off, in sampling, too); "
        "auto: where it is exact and pays",
    )
    optim: str = option(
        "adamw_torch",
        "optimizer, by its name in transformers, e.g. adamw_torch_8bit (torchao) or "
        "paged_adamw_8bit (bitsandbytes)",
    )
    learning_rate: float = option(None, "highest learning rate of the schedule")
    lr_scheduler: str = option(
        "linear", "learning rate schedule, by its name in transformers.get_scheduler"
    )
    lr_warmup_steps: int = option(None, "number of GRPO steps until the learning rate is highest")
    weight_decay: float = option(0.0, "weight decay of the optimizer")
    max_grad_norm: float = option(
        1.0, "largest gradient norm; larger gradients are scaled down to it"
    )
    # The objective
    objective: str = option(
        "grpo",
        "preset of grpo_fast.Objective, or dapo_zv: dapo without the tokens of groups without signal in "
        "its denominator; the six options after it override its values",
    )
    beta: float | None = option(
        None, "weight of the KL to the policy before GRPO; 0: no reference model"
    )
    kl: str | None = option(None, "KL estimator: k1, abs, k2, k3 or k3_unbiased")
    epsilon_low: float | None = option(
        None, "lower end of the clip range: the ratio is clipped below 1 - epsilon_low"
    )
    epsilon_high: float | None = option(
        None, "upper end of the clip range: the ratio is clipped above 1 + epsilon_high"
    )
    reduction: str | None = option(
        None,
        "how token losses are averaged: sequence_mean, token_mean, sequence_sum or fixed_length",
    )
    entropy_coef: float | None = option(None, "weight of the entropy bonus")
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group",
        "divide advantages by the standard deviation of the group, of the batch, or not at all",
    )
    # Several processes
    fsdp: bool = option(
        False, "share the weights between the processes (FSDP2); default: each has all of them"
    )
    # The run
    name: str | None = option(
        None,
        "name of the run; default: that of the task or dataset, with -2, -3, ... if it is taken",
    )
    output_dir: str = option("runs", "folder of all runs; this run is in <output_dir>/<name>")
    overwrite: bool = option(False, "replace an existing run of this name")
    resume: str | None = option(
        None,
        "continue a run from its newest checkpoint: its folder, or latest; with its own options",
    )
    dry_run: bool = option(
        False, "take two steps with a tiny model of the same architecture, to try the options"
    )
    seed: int = option(0, "seed of all random numbers")
    threads: int = option(0, "number of CPU threads; 0: one for a new model, else PyTorch's choice")
    save_steps: int = option(100, "number of GRPO steps between two checkpoints")
    keep_checkpoints: int = option(2, "number of checkpoints to keep, the newest ones")
    samples: int = option(4, "number of completions to print before and after training")
    completions_steps: int = option(
        20, "number of GRPO steps between two tables of completions; 0: none"
    )
    report_to: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "trackers of accelerate, e.g. tensorboard, wandb or trackio; default: none"
        },
    )

    def __post_init__(self) -> None:
        for name in ("dataset", "reward_dir", "output_dir", "resume"):
            if (getattr(self, name) or "").startswith("~"):
                setattr(self, name, str(Path(getattr(self, name)).expanduser()))
        for name, defaults in DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, defaults[self.model is not None])
        if self.heldout is None and self.dataset is None and self.task == "arithmetic":
            self.heldout = HELDOUT
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= low):
                raise ValueError(f"{name}: want a finite number >= {low}, got {value}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: want a positive number, got {value}")
        for name in ("warmup_error_rate", "warmup_reward"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: want a number in [0, 1], got {getattr(self, name)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose from "
                    f"{', '.join(filter(None, choices))}"
                )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size}: want an even multiple of num_heads={self.num_heads}"
            )
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"reward_weights: want one for each of the {len(self.reward)} functions of reward, "
                f"got {self.reward_weights}"
            )
        if not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"reward_weights: want finite numbers, got {self.reward_weights}")
        if self.name is not None and (
            self.name in ("", ".", "..") or Path(self.name).name != self.name
        ):
            raise ValueError(f"name: want the name of a folder in output_dir, got {self.name!r}")
        self._check_task()
        self._check_together()
        self.to_objective()

    def _check_task(self) -> None:
        """Check the name of the task."""
        kind, _, name = self.task.partition(":")
        if self.task not in TASKS and not (kind == "reasoning_gym" and name):
            raise ValueError(
                f"task={self.task!r} is unknown; choose from {', '.join(TASKS)} or reasoning_gym:NAME"
                f"{did_you_mean(closest(self.task, TASKS)[:1])}"
            )
        unknown = [q for q in self.questions if q not in QUESTIONS]
        if unknown or not self.questions:
            raise ValueError(
                f"questions={self.questions}: want some of {', '.join(QUESTIONS)}"
                f"{did_you_mean(closest(unknown[0], QUESTIONS)[:1]) if unknown else ''}"
            )
        twice = [q for q in self.questions if self.questions.count(q) > 1]
        if twice:
            raise ValueError(f"questions: {twice[0]!r} is given twice")
        if self.dataset is not None and self.task != "arithmetic":
            raise ValueError(f"task={self.task!r}: dataset={self.dataset!r} is given; choose one")
        if self.task != "arithmetic" and self.model is None:
            raise ValueError(f"task={self.task!r}: it needs a pretrained model; give --model")
        source = kind if self.dataset is None else "dataset"
        for name, kinds in _OF_TASK.items():
            if source not in kinds and getattr(self, name) != _default(name):
                place = f"task={self.task!r}" if self.dataset is None else "a dataset"
                raise ValueError(f"{name}={getattr(self, name)!r}: {place} does not use it")
        if self.system_prompt and not self.chat and source != "countries":
            raise ValueError("system_prompt: the prompts are no chat; add --chat")

    def _check_together(self) -> None:
        """Check combinations of options."""
        if self.quantize and not self.use_peft:
            raise ValueError(
                f"quantize={self.quantize!r}: quantised weights cannot be trained; add --use_peft"
            )
        if self.use_peft and self.weights == "bfloat16_only":
            raise ValueError(
                "weights='bfloat16_only': an adapter is float32; give --weights bfloat16"
            )
        if self.use_peft and self.model is None:
            raise ValueError(
                "use_peft: a new model has no weights that an adapter could adapt; give --model"
            )
        if self.quantize and self.fsdp:
            raise ValueError(f"fsdp: quantize={self.quantize!r} cannot be shared between processes")
        if self.fsdp and self.weights == "bfloat16_only":
            raise ValueError("fsdp: it keeps float32 weights; leave out --weights bfloat16_only")
        if self.reward_timeout > threading.TIMEOUT_MAX:
            raise ValueError(
                f"reward_timeout: want at most {threading.TIMEOUT_MAX:.0f} s, got {self.reward_timeout}"
            )
        if self.mismatch_cap < 1:
            raise ValueError(f"mismatch_cap: want a number >= 1, got {self.mismatch_cap}")

    @property
    def without_silent_groups(self) -> bool:
        """Tell whether groups without signal are left out of the denominator, too (`dapo_zv`)."""
        return self.objective == "dapo_zv"

    def to_objective(self) -> Objective:
        """Return the preset with the overrides of this configuration.

        Raises:
            ValueError: the preset is unknown, or a value is out of range.
        """
        names = ("beta", "kl", "epsilon_low", "epsilon_high", "reduction", "entropy_coef")
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        preset = "dapo" if self.without_silent_groups else self.objective
        reduction = {**PRESETS.get(preset, {}), **given}.get("reduction")
        if reduction == "fixed_length":
            given["max_length"] = self.max_new_tokens
        return Objective.preset(preset, **given)


# The tasks that use an option; "dataset": the user's data.
_OF_TASK = {
    "questions": ("countries",),
    "problems": ("reasoning_gym",),
    "examples": ("reasoning_gym",),
    "task_options": ("reasoning_gym",),
    "chat": ("dataset", "reasoning_gym"),
    "system_prompt": ("dataset", "reasoning_gym", "countries"),
}


def _default(name: str) -> Any:
    """Return the default of an option."""
    (found,) = (f for f in dataclasses.fields(TrainConfig) if f.name == name)
    return (
        found.default if found.default_factory is dataclasses.MISSING else found.default_factory()
    )


_AT_LEAST = {
    "max_operand": 3, "problems": 2, "examples": 0,
    "heldout": 1, "hidden_size": 2, "num_layers": 1, "num_heads": 1,
    "warmup_steps": 0, "warmup_batch_size": 1, "prompts_per_step": 1, "group_size": 2,
    "max_new_tokens": 1, "steps": 1, "num_iterations": 1, "micro_batch_size": 1,
    "micro_batch_tokens": 1, "sampling_tokens": 1, "resample": 0, "lora_r": 1,
    "lr_warmup_steps": 0, "weight_decay": 0, "seed": 0, "threads": 0, "save_steps": 1,
    "keep_checkpoints": 1, "samples": 0, "completions_steps": 0,
}  # fmt: skip
_POSITIVE = (
    "learning_rate", "warmup_learning_rate", "temperature", "max_grad_norm", "reward_timeout",
    "lora_alpha", "mismatch_cap",
)  # fmt: skip
_CHOICES: dict[str, tuple[str | None, ...]] = {
    **{
        f.name: get_args(f.type)
        for f in dataclasses.fields(TrainConfig)
        if get_origin(f.type) is Literal
    },
    "quantize": (None, *get_args(Quantisation)),
    # The schedules that need nothing but the number of steps.
    "lr_scheduler": ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"),
}
