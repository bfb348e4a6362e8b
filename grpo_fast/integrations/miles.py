"""miles (August 2026): its policy loss, by this library.

    --loss-type custom_loss --custom-loss-function-path grpo_fast.integrations.miles.policy_loss

with all other options as they are. miles is a fork of slime: see `slime`. Its loss clamps log-ratios to 20
nats, reports more, and runs on Megatron or FSDP. With `--true-on-policy-mode`, with padded batches
(`--qkv-format bshd`) and at temperature 0, log-probs are its own.
"""

from typing import Any

import torch
from torch import Tensor

from grpo_fast.diagnostics import TokenDiagnostics, kl_estimate
from grpo_fast.integrations.slime import Metrics, Slime, to_objective
from grpo_fast.objective import Objective
from grpo_fast.presets import GUARDED_K3

UTILS = "miles.backends.training_utils"
LOSS, HUB = f"{UTILS}.loss", f"{UTILS}.loss_hub"


def policy_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any
) -> tuple[Tensor, Metrics]:
    """miles' `policy_loss_function`.

    Returns:
        The loss, and miles' metrics of it, detached.

    Raises:
        ValueError: options that cannot be the same here.
        ImportError: miles is missing.
    """
    return Miles().policy_loss(args, batch, logits, sum_of_sample_mean)


class Miles(Slime):
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
        return plain and not args.true_on_policy_mode

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
            metrics["train_rollout_logprob_abs_diff"] = reduce((old - sampled).abs())
            kl = kl_estimate(sampled, old, Objective(**GUARDED_K3))
            metrics["train_rollout_kl"] = reduce(kl)
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
