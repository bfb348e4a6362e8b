"""The adapter of slime (August 2026): its policy loss. The adapter `miles` builds on this one.

    --loss-type custom_loss --custom-loss-function-path grpo_fast.integrations.slime.policy_loss

Leave all other options as they are: `--advantage-estimator`, clipping, KL, entropy, OPSM, TIS. Without tensor
parallelism, context parallelism and top-p replay, the loss and its gradient are computed in one pass over the
logits. The gradient overwrites the logits, unless `--recompute-loss-function` is set. In the other cases
slime computes the log-probs, and the loss is computed from them.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from grpo_fast.diagnostics import TokenDiagnostics, token_diagnostics
from grpo_fast.integrations.shared.call import changed_by_clamp, sequence_mean
from grpo_fast.integrations.shared.options import Entry, entry, objective_of, read_options
from grpo_fast.integrations.shared.responses import (
    boundaries,
    from_log_probs,
    from_logits,
    reducer_weights,
)
from grpo_fast.loss import LossOutput
from grpo_fast.notices import fell_back
from grpo_fast.objective import Objective
from grpo_fast.sequences import sum_over_sequence

LOSS = "slime.backends.megatron_utils.loss"
Metrics = dict[str, Tensor]

# The options of `Objective`, and the arguments of slime that set them.
OPTIONS: dict[str, Entry] = {
    "epsilon_low": entry("eps_clip"),
    "epsilon_high": entry("eps_clip_high", "eps_clip"),
    "entropy_coef": entry("entropy_coef"),
}
MORE: dict[str, Entry] = {
    "dual_clip": entry("eps_clip_c"),
    "off_policy_threshold": entry("opsm_delta"),
    "beta": entry("kl_loss_coef"),
    "kl": entry("kl_loss_type"),
}


def policy_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any
) -> tuple[Tensor, Metrics]:
    """Replace slime's `policy_loss_function`.

    Returns:
        The loss, and slime's metrics of it, detached. "entropy_loss" is there if the entropy is computed: on
        the fused path only for an `entropy_coef` other than 0.

    Raises:
        ValueError: an option would give another loss here.
        ImportError: Megatron or slime is needed, and missing.
    """
    return Slime().policy_loss(args, batch, logits, sum_of_sample_mean)


def to_objective(args: Any, **more: Any) -> Objective:
    """Translate slime's arguments into an objective; the weights of slime's sum are `token_weights`."""
    if getattr(args, "custom_pg_loss_reducer_function_path", None) is not None:
        raise ValueError("custom_pg_loss_reducer_function_path is not supported")
    kind = args.advantage_estimator if args.advantage_estimator in ("gspo", "cispo") else "grpo"
    chosen = {"reduction": "token_mean"} | read_options(args, OPTIONS)
    if kind != "cispo":
        chosen["dual_clip"] = args.eps_clip_c
    if args.use_opsm:
        chosen["off_policy_threshold"] = args.opsm_delta
    if args.use_kl_loss:
        name, unbiased = args.kl_loss_type, args.use_unbiased_kl
        if unbiased and (name != "k3" or kind == "gspo"):
            raise ValueError(
                f"use_unbiased_kl with kl_loss_type={name!r} and advantage_estimator="
                f"{args.advantage_estimator!r} is not supported: want k3 and a ratio per token"
            )
        chosen |= {"beta": args.kl_loss_coef, "kl": "k3_unbiased" if unbiased else name}
        if name == "low_var_kl":
            chosen |= {"kl": "k3", "kl_value_clip": 10.0}
    return objective_of(f"slime/{kind}", chosen | more, OPTIONS | MORE)


class Slime:
    """The policy loss. Its methods are the parts that miles has elsewhere or computes otherwise."""

    needs = "slime of August 2026 or later on Megatron-LM"

    def load(self, name: str) -> Any:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"this needs {self.needs}: no module {name}") from error

    def ranks(self) -> tuple[int, int]:
        """Return the numbers of tensor-parallel and of context-parallel ranks."""
        mpu = self.load("megatron.core").mpu
        return (
            mpu.get_tensor_model_parallel_world_size(),
            mpu.get_context_parallel_world_size(),
        )

    def objective(self, args: Any) -> Objective:
        return to_objective(args)

    def old_log_probs(self, args: Any, batch: dict[str, Any]) -> list[Tensor] | None:
        return batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")

    def reads_logits(self, args: Any) -> bool:
        """Tell whether the log-probs follow from the logits of this rank alone."""
        return getattr(args, "rollout_top_p", 1.0) == 1.0

    def wants_entropy(self, args: Any) -> bool:
        """Tell whether the entropy is wanted where the objective does not need it."""
        return False

    def score(self, args: Any, batch: dict[str, Any], logits: Tensor) -> dict[str, list[Tensor]]:
        """Compute log-probs and entropies by the host's own function, which knows its parallelism."""
        home = self.load(LOSS)
        return home.get_log_probs_and_entropy(
            logits,
            args=args,
            unconcat_tokens=batch["unconcat_tokens"],
            total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
            with_entropy=True,
            **home.get_rollout_top_p_logprob_kwargs(args, batch),
        )[1]

    def correction(self, args: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the TIS function of the host or of the user, and its arguments besides the batch."""
        home, path = self.load(LOSS), args.custom_tis_function_path
        return home.vanilla_tis_function if path is None else home.load_function(path), {}

    def reducer(self, args: Any, batch: dict[str, Any], masks: list[Tensor]) -> Any:
        return self.load(LOSS).get_sum_of_sample_mean(
            batch["total_lengths"],
            batch["response_lengths"],
            masks,
            batch["rollout_mask_sums"],
            args.calculate_per_token_loss,
        )

    def more_metrics(
        self,
        args: Any,
        batch: dict[str, Any],
        logps: Tensor,
        old: Tensor | None,
        token: TokenDiagnostics,
        reduce: Any,
    ) -> Metrics:
        """Return the metrics of the distance between trainer and sampler."""
        if not batch.get("rollout_log_probs"):
            return {}
        compared = logps if args.use_rollout_logprobs or old is None else old
        gap = compared - torch.cat(batch["rollout_log_probs"])
        return {"train_rollout_logprob_abs_diff": reduce(gap.abs())}

    def evaluate(
        self,
        args: Any,
        batch: dict[str, Any],
        logits: Tensor,
        objective: Objective,
        tokens: dict[str, Any],
        given: dict[str, Any],
        fused: bool,
    ) -> tuple[LossOutput, TokenDiagnostics]:
        """Compute the loss, from the logits or from the host's log-probs, and the values of each token."""
        if fused:
            out = from_logits(args, batch, logits, objective, tokens, self.wants_entropy(args))
        else:
            out = from_log_probs(self.score(args, batch, logits), logits, objective, tokens)
        return out, token_diagnostics(out.logps, **given, objective=objective)

    def policy_loss(
        self, args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any
    ) -> tuple[Tensor, Metrics]:
        objective, ranks = self.objective(args), self.ranks()
        if ranks[1] > 1 and objective.needs_sequences:
            raise ValueError(
                f"context parallelism ({ranks[1]} ranks) splits sequences, which "
                f"{'OPSM' if objective.ratio == 'token' else args.advantage_estimator} needs whole"
            )
        old, advantages = self.old_log_probs(args, batch), torch.cat(batch["advantages"])
        corrected: Metrics = {}
        importance, reduce = None, sum_of_sample_mean
        if args.use_tis or args.get_mismatch_metrics:
            importance, reduce, corrected = self._correct(args, batch)
        weights, mask = reducer_weights(reduce, advantages), torch.cat(batch["loss_masks"])
        if ranks[1] > 1:  # the weights tell which tokens are on this rank
            mask = weights != 0
        elif not objective.needs_sequences:  # the weights contain the mask already
            mask = mask != 0
        elif mask.is_floating_point():  # it is also a weight in the means of sequences
            weights = torch.where(mask != 0, weights / mask, 0)
        given: dict[str, Any] = {
            "advantages": advantages,
            "mask": mask,  # the response tokens that count
            "old_logps": torch.cat(old) if old else None,
            "ref_logps": torch.cat(batch["ref_log_probs"]) if args.use_kl_loss else None,
        }
        tokens = {"importance_weights": importance, "token_weights": weights} | given
        tokens = {name: x for name, x in tokens.items() if x is not None}
        if objective.needs_sequences:
            given["cu_seqlens"] = boundaries(batch["response_lengths"], logits.device)
        fused = ranks == (1, 1) and self.reads_logits(args)
        if not fused:
            why = "its options need its own log-probs"
            if ranks != (1, 1):
                why = f"{ranks[0]} tensor-parallel and {ranks[1]} context-parallel ranks share the logits"
            fell_back("host_log_probs", why, quiet=True)
        out, token = self.evaluate(args, batch, logits, objective, tokens, given, fused)
        with torch.no_grad():

            def mean(x: Tensor) -> Tensor:
                return reduce(torch.where(given["mask"] != 0, x, 0))

            metrics = _metrics(args, batch, out, token, objective, given, mean)
            if importance is not None:  # over all tokens, also those that the correction rejects
                metrics |= {name: sum_of_sample_mean(x) for name, x in corrected.items()}
                # `token.ratio` would be wrong: miles clamps the ratio of its loss, but not this one.
                metrics["ois"] = sum_of_sample_mean(token.log_ratio.exp())
            metrics |= self.more_metrics(args, batch, out.logps, given["old_logps"], token, mean)
        return out.loss, metrics

    def _correct(self, args: Any, batch: dict[str, Any]) -> tuple[Tensor, Any, Metrics]:
        """Return (importance weights, reducer, metrics) of the TIS function."""
        if not batch.get("log_probs"):
            raise ValueError("use_tis: batch['log_probs'], the trainer's old log-probs, are needed")
        function, more = self.correction(args, batch)
        weights, masks, metrics = function(
            args=args,
            pg_loss=torch.ones_like(torch.cat(batch["log_probs"])),
            train_log_probs=batch["log_probs"],
            rollout_log_probs=batch["rollout_log_probs"],
            loss_masks=batch["loss_masks"],
            total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
            **more,
        )
        return weights.detach(), self.reducer(args, batch, masks), metrics


def _metrics(
    args: Any,
    batch: dict[str, Any],
    out: LossOutput,
    token: TokenDiagnostics,
    objective: Objective,
    given: dict[str, Any],
    reduce: Any,
) -> Metrics:
    """Return slime's metrics of the loss."""
    clipped = token.clipped if objective.surrogate == "clip" else changed_by_clamp(token)
    metrics = {"loss": out.loss.detach(), "pg_loss": out.loss.detach()}
    if out.entropy is not None:
        metrics["entropy_loss"] = reduce(out.entropy)
        metrics["pg_loss"] = metrics["pg_loss"] + objective.entropy_coef * metrics["entropy_loss"]
    metrics |= {"pg_clipfrac": reduce(clipped.float()), "ppo_kl": reduce(-token.log_ratio)}
    if args.use_kl_loss:
        metrics["kl_loss"] = reduce(token.kl)
        metrics["pg_loss"] = metrics["pg_loss"] - objective.beta * metrics["kl_loss"]
    if args.use_opsm:  # slime also counts the masked tokens of a stale response
        mask, cu_seqlens = given["mask"], given["cu_seqlens"]
        old = given["old_logps"]
        drift = torch.zeros_like(out.logps) if old is None else old - out.logps
        stale = sequence_mean(drift, mask, cu_seqlens) > args.opsm_delta
        dropped = (stale & (given["advantages"] < 0)).float()
        count = sum_over_sequence(mask.to(dropped), mask != 0, cu_seqlens).clamp(min=1)
        metrics["opsm_clipfrac"] = (dropped / count).sum()
    if batch.get("opd_reverse_kl"):
        metrics["opd_reverse_kl"] = reduce(torch.cat(batch["opd_reverse_kl"]))
    return metrics
