"""The adapter of miles (August 2026): its policy loss.

    --loss-type custom_loss --custom-loss-function-path grpo_fast.integrations.miles.policy_loss

Leave all other options as they are. miles is a fork of slime: see the adapter `slime`. Its loss clamps
log-ratios to 20 nats, has more metrics, and runs on Megatron or FSDP. A log-ratio, an advantage or a KL that
is not finite counts as 0, in miles and here. miles computes the log-probs itself with
`--true-on-policy-mode`, with padded batches (`--qkv-format bshd`), at temperature 0, and with a KL term other
than low_var_kl.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from grpo_fast.diagnostics import TokenDiagnostics, kl_estimate, token_diagnostics
from grpo_fast.integrations.shared.call import sequence_mean
from grpo_fast.integrations.shared.responses import from_log_probs, from_logits, scored_entries
from grpo_fast.integrations.slime import Metrics, Slime, to_objective
from grpo_fast.loss import LossOutput
from grpo_fast.objective import Objective
from grpo_fast.presets import GUARDED_K3
from grpo_fast.sequences import sum_over_sequence

UTILS = "miles.backends.training_utils"
LOSS, HUB = f"{UTILS}.loss", f"{UTILS}.loss_hub"
LARGE = 1e32  # stands for a missing log-prob: in a mean it outweighs all others


def policy_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any
) -> tuple[Tensor, Metrics]:
    """Replace miles' `policy_loss_function`.

    Returns:
        The loss, and miles' metrics of it, detached.

    Raises:
        ValueError: an option would give another loss here.
        ImportError: miles is missing.
    """
    return Miles().policy_loss(args, batch, logits, sum_of_sample_mean)


class Miles(Slime):
    """The policy loss of miles, where it differs from slime's."""

    needs = "miles of August 2026 or later"

    def ranks(self) -> tuple[int, int]:
        state = self._state()
        return state.tp.size, state.cp.size

    def objective(self, args: Any) -> Objective:
        more = GUARDED_K3 if args.use_kl_loss and args.kl_loss_type == "low_var_kl" else {}
        return to_objective(args, log_ratio_clip=20.0, **more)

    def old_log_probs(self, args: Any, batch: dict[str, Any]) -> list[Tensor] | None:
        if args.skip_actor_forward_only and not args.use_rollout_logprobs:
            return None  # on policy: the old policy is the current one
        old = super().old_log_probs(args, batch)
        if old is None:
            name = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
            raise ValueError(f"batch[{name!r}]: needed, the old policy's log-probs")
        return old

    def reads_logits(self, args: Any) -> bool:
        plain = args.qkv_format == "thd" and args.rollout_temperature > 0
        # In a fused pass the KL of a single token can only be left out if it has a clamp.
        clamped = not args.use_kl_loss or args.kl_loss_type == "low_var_kl"
        return plain and clamped and not args.true_on_policy_mode

    def wants_entropy(self, args: Any) -> bool:
        return args.entropy_coef != 0 or args.observe_training_entropy

    def score(self, args: Any, batch: dict[str, Any], logits: Tensor) -> dict[str, list[Tensor]]:
        return self.load(LOSS).get_log_probs_and_entropy(
            logits,
            args=args,
            unconcat_tokens=batch["unconcat_tokens"],
            total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
            with_entropy=self.wants_entropy(args),
            entropy_requires_grad=args.entropy_coef != 0,
            max_seq_lens=batch.get("max_seq_lens"),
        )

    def correction(self, args: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args.skip_actor_forward_only:
            raise ValueError(
                "skip_actor_forward_only with use_tis or get_mismatch_metrics is not supported: the old "
                "log-probs have to be known before the loss"
            )
        path = args.custom_tis_function_path
        function = (
            self.load(f"{HUB}.corrections").vanilla_tis_function
            if path is None
            else self.load("miles.utils.misc").load_function(path)
        )
        return function, {
            "parallel_state": self._state(),
            "max_seq_lens": batch.get("max_seq_lens"),
        }

    def reducer(self, args: Any, batch: dict[str, Any], masks: list[Tensor]) -> Any:
        return self.load(LOSS).get_sum_of_sample_mean(
            batch["total_lengths"],
            batch["response_lengths"],
            masks,
            args.calculate_per_token_loss,
            args.qkv_format,
            batch.get("max_seq_lens"),
            denominators=batch.get("rollout_mask_sums"),
        )

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
        """Compute the loss with 0 in place of log-ratios, advantages and KLs that are not finite.

        In miles a token with such a log-ratio has a ratio of 1, without a gradient. Here its advantage is 0,
        and the constant that is then missing in the loss is added.
        """
        old, ref, live = given["old_logps"], given["ref_logps"], given["mask"] != 0
        scored = None if fused else self.score(args, batch, logits)
        with torch.no_grad():
            lost = self._lost(batch, logits, scored, given, objective)
            advantages = given["advantages"].nan_to_num(0, 0, 0)
            changed = {"advantages": advantages.masked_fill(lost, 0)}
            if old is not None:  # finite, with the same decision of OPSM's mean over the sequence
                changed["old_logps"] = old.nan_to_num(-LARGE, LARGE / 100, -LARGE)
        constant = torch.zeros_like(advantages)
        if scored is None:
            if ref is not None:  # at the clamp the KL has a value and no gradient
                missing = ref.isnan() & live
                changed["ref_logps"] = ref.masked_fill(missing, torch.inf)
                constant -= objective.beta * GUARDED_K3["kl_value_clip"] * missing
            entropy = self.wants_entropy(args)
            out = from_logits(args, batch, logits, objective, tokens | changed, entropy)
        else:
            policy = dataclasses.replace(objective, beta=0.0)
            out = from_log_probs(scored, logits, policy, tokens | changed | {"ref_logps": None})
        with torch.no_grad():
            seen = given | changed | {"ref_logps": ref}
            token = token_diagnostics(out.logps, **seen, objective=objective)
            counted = token.kl.isfinite()
            if objective.kl == "k3_unbiased":  # the ratio is a factor of it
                counted &= ~lost
            left_out = -advantages * (lost & ~_stale(out.logps, seen, objective, advantages))
            constant += left_out * tokens.get("importance_weights", 1)
        weight = given["mask"] * tokens["token_weights"]
        loss = out.loss + torch.where(live, constant * weight, 0).sum()
        if scored is not None and objective.beta:
            loss = loss + _kl_alone(scored, logits, objective, tokens | changed, counted)
        token = token._replace(
            log_ratio=token.log_ratio.masked_fill(lost, 0), kl=token.kl.where(counted, 0)
        )
        return out._replace(loss=loss), token

    def _lost(
        self,
        batch: dict[str, Any],
        logits: Tensor,
        scored: dict[str, list[Tensor]] | None,
        given: dict[str, Any],
        objective: Objective,
    ) -> Tensor:
        """Return the tokens whose log-ratio, or that of their sequence, is not finite."""
        if scored is None:  # an entry of the logits is finite where its log-prob is
            rows, ids = scored_entries(batch, logits.device)
            logps = logits[0, rows, ids].float()
        else:
            logps = torch.cat(scored["log_probs"])
        live, old = given["mask"] != 0, given["old_logps"]
        lost = live & ~(logps - (logps if old is None else old)).isfinite()
        if objective.ratio == "token":
            return lost
        return live & (sum_over_sequence(lost.float(), live, given["cu_seqlens"]) > 0)

    def more_metrics(
        self,
        args: Any,
        batch: dict[str, Any],
        logps: Tensor,
        old: Tensor | None,
        token: TokenDiagnostics,
        reduce: Any,
    ) -> Metrics:
        metrics = {}
        if batch.get("rollout_log_probs"):
            old, sampled = logps if old is None else old, torch.cat(batch["rollout_log_probs"])
            gap = (old - sampled).abs().nan_to_num(0, 0, 0)
            metrics["train_rollout_logprob_abs_diff"] = reduce(gap)
            kl = kl_estimate(sampled, old, Objective(**GUARDED_K3))
            metrics["train_rollout_kl"] = reduce(kl.nan_to_num(0, 0, 0))
        ess = self.load(f"{HUB}.math_utils").compute_ess_ratio_contribution(
            ppo_kl=-token.log_ratio,
            loss_masks=batch["loss_masks"],
            total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
            qkv_format=args.qkv_format,
            max_seq_lens=batch.get("max_seq_lens"),
            calculate_per_token_loss=args.calculate_per_token_loss,
        )
        metrics["ess_ratio"] = ess.squeeze()
        if not self.wants_entropy(args):
            metrics["entropy_loss"] = torch.zeros_like(metrics["ess_ratio"])
        return metrics

    def _state(self) -> Any:
        return self.load(f"{UTILS}.parallel").get_parallel_state()


def _stale(
    logps: Tensor, given: dict[str, Any], objective: Objective, advantages: Tensor
) -> Tensor:
    """Return the tokens that OPSM drops."""
    if objective.off_policy_threshold is None:
        return torch.zeros_like(logps, dtype=torch.bool)
    drift = given["old_logps"] - logps
    mean = sequence_mean(drift, given["mask"], given["cu_seqlens"])
    return (mean > objective.off_policy_threshold) & (advantages < 0)


def _kl_alone(
    scored: dict[str, list[Tensor]],
    logits: Tensor,
    objective: Objective,
    tokens: dict[str, Any],
    counted: Tensor,
) -> Tensor:
    """Return the KL term of the tokens in `counted`, as a loss."""
    kl = dataclasses.replace(objective, entropy_coef=0.0, off_policy_threshold=None)
    changed = {
        "advantages": torch.zeros_like(tokens["advantages"]),
        "importance_weights": None,
        "mask": tokens["mask"] * counted,
    }
    return from_log_probs(scored, logits, kl, tokens | changed).loss
