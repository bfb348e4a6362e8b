"""`linear_grpo_loss`: the public half of `grpo_fast.ops.linear_grpo`."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast import reference
from grpo_fast._names import keywords_explained
from grpo_fast._operands import Modes, operand
from grpo_fast._output import LossOutput, loss_output
from grpo_fast.objective import OPTIONS, Objective
from grpo_fast.ops import _arguments, _float64, _phases
from grpo_fast.ops._autograd import anchors_of, once_differentiable
from grpo_fast.ops._head_arguments import Needs, check_head
from grpo_fast.ops._tokens import Sequences, Tokens, check_objective, check_tokens
from grpo_fast.ops.group_advantage import group_advantage_fwd, kept_whole
from grpo_fast.ops.grpo import SCORE_EPS, Arguments, spread
from grpo_fast.ops.linear_grpo import linear_grpo
from grpo_fast.ops.linear_logprob import linear_logprob_fwd


@keywords_explained(OPTIONS)
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: Literal["fp32", "bf16"] = "fp32",
    vocab_size: int | None = None,
    compact: bool = True,
    chunk_size: int | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    dw_out: Tensor | None = None,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    scores: Tensor | None = None,
    num_items: float | Tensor | None = None,
    loss_scale: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    objective: Objective = Objective(),
    return_entropy: bool = False,
) -> LossOutput:
    """The GRPO loss from the last hidden states and the head, with its gradients, the logits never in memory.

    Equivalent to `grpo_loss(cap(logit_scale * (hidden @ weight.T + bias)), completion_ids, ...)` with
    `cap(x) = softcap * tanh(x / softcap)`, the logits living in one chunk of tokens at a time. The gradients
    are computed in the forward: three matrix products, two where the head is frozen. Beyond the gradients
    and a float32 gradient of the weight, memory does not grow with the number of tokens; in float16 that of
    `hidden` is float32 until the backward, so that a loss scale keeps it from underflow.

    Args:
        hidden: (B, T, D) or (N, D), float32, bfloat16, float16 or float64: the last hidden states, row t
            for token t. The products are of its dtype.
        weight: (rows, D) of the head, of any of these dtypes: converted to that of `hidden` for the
            products, its gradient accumulated in float32 and of its own dtype. Under FSDP call this inside
            the forward of the module that owns it, where it has been gathered. Where `hidden`, weight, bias
            or `lora` is float64, all of it is, loss, log-probs and entropy too: `grpo_fast.reference` in
            chunks of tokens, for models whose digits matter more than their speed. No token is left out
            then, and there is no `dw_out` and no `tp_group`.
        completion_ids: (B, T) or (N,), int32 or int64; anything where the mask is 0.
        bias: (rows,).
        softcap: of the logits (Gemma 2); None for none.
        logit_scale: positive factor on the logits (Cohere).
        logits_dtype: "fp32": logits of half-precision operands are not rounded. "bf16": they are rounded to
            the operands' dtype, as a model's own head does; less workspace.
        vocab_size: rows of `weight` that are vocabulary; those after it are padding, their gradient is 0.
        compact: leave tokens that cannot have a gradient out of all products: masked ones, those whose
            weight is 0, and, with beta = 0 and no entropy bonus, those whose advantage or importance weight
            is 0 (for an objective that looks at sequences: sequences of such tokens). Their number must
            reach the host: on a GPU one sync. For an objective of the token there is none if `mask`,
            `token_weights`, `cu_seqlens` and `advantages` or `rewards`, as far as given, are on the CPU,
            which is allowed. Loss and gradients are the same up to the order of summation. Without it the
            ends of packed sequences stay on the device, and objectives on sequences take two phases (four
            products), unless on policy or the head is frozen.
        chunk_size: tokens per chunk. Every product has exactly so many rows. Default: chosen from the
            number of tokens and the device.
        lora: (A (r, D), B (rows, r), scaling): adds `scaling * (hidden @ A.T) @ B.T` to the logits.
        tp_group: processes that share the vocabulary. Each gives its rows of weight, bias and `lora`'s B,
            consecutive in the order of the ranks, and everything else alike; ids and `vocab_size` are of the
            whole vocabulary. Each gets the same loss and log-probs and the whole gradient of `hidden`. One
            all-gather of four numbers per token and chunk, one reduction of the gradient, and one look at
            each other's numbers of rows, a sync (compiled: they must be equal).
        dw_out: (rows, D) float32: the backward adds the gradient of the weight to it, unrounded, instead of
            handing it to autograd, which sees none. The float32 buffer of the forward is added, so that any
            upstream gradient is right; it saves the gradient in the dtype of the weight. An upstream gradient
            of 0 does not undo an inf or NaN of the forward, here as in PyTorch: 0 times inf is NaN.
        return_entropy: compute the entropy also where the objective does not need it, and it and the
            log-probs of every token that is not masked: those that `compact` left out of the gradient get a
            pass for their logits, one of the three products, and on a GPU another sync.
        advantages, rewards, group_size, mask, old_logps, ref_logps, importance_weights, token_weights,
            scores, num_items, loss_scale, cu_seqlens, temperature, objective: as in `grpo_loss`: constants,
            `old_logps` and `ref_logps` with a graph too. A factor on the loss costs a pass over the gradients
            of `hidden` and the parameters, where `loss_scale` costs nothing. Where the mask is 0, `hidden`
            may hold NaN.

    Returns:
        `LossOutput`. Log-probs and entropy of tokens left out are unspecified (0), and the metrics are of
        the tokens that were computed (`metrics["tokens"]` of them); with `return_entropy` that is all that
        are not masked. `metrics["skipped_fraction"]` is the share of rows without a gradient pass. backward
        works once: a second one, or a second derivative, raises.

    Raises:
        ValueError, TypeError: as `grpo_loss`.
        NotImplementedError: forward-mode derivatives.
    """
    op = "linear_grpo_loss"
    check_objective(op, objective)
    rewards = _arguments.one_per_sequence(rewards)
    flat, parameters, options, V = check_head(
        op,
        hidden,
        weight,
        completion_ids,
        "completion_ids",
        bias,
        softcap,
        logit_scale,
        logits_dtype,
        vocab_size,
        chunk_size,
        lora,
        tp_group,
    )
    _check_dw_out(op, dw_out, weight, flat)
    device = completion_ids.device

    def here(x: Any) -> Any:
        """On the device of the rest, without waiting for it."""
        return x.to(device, non_blocking=True) if isinstance(x, Tensor) and x.is_cpu else x

    deciding = [advantages, rewards, token_weights, cu_seqlens]
    given = _arguments.check_mask(op, mask, completion_ids, anywhere=True)
    live = here(given)
    ids = _arguments.check_ids(op, "completion_ids", completion_ids, live, V)
    temperatures, inv_temperature = _arguments.check_temperature(
        op, temperature, completion_ids, live
    )
    tokens, sequences = check_tokens(
        op,
        completion_ids,
        live,
        _arguments.floating_mask(mask, completion_ids),
        here(advantages),
        here(rewards),
        group_size,
        old_logps,
        ref_logps,
        importance_weights,
        here(token_weights),
        here(scores),
        num_items,
        here(cu_seqlens),
        loss_scale,
        objective,
    )
    tokens = _scored(tokens, completion_ids)
    if flat.dtype == torch.float64:
        given_tokens = {
            "advantages": here(advantages),
            "rewards": here(rewards),
            "group_size": group_size,
            "mask": here(mask),
            "old_logps": old_logps,
            "ref_logps": ref_logps,
            "importance_weights": importance_weights,
            "token_weights": here(token_weights),
            "scores": here(scores),
            "num_items": num_items,
            "loss_scale": loss_scale,
            "cu_seqlens": here(cu_seqlens),
            "objective": objective,
        }
        logp, entropy = _float64.log_probs(flat, parameters, options, ids, live, temperature)
        with_entropy = return_entropy or objective.needs_entropy
        return _in_float64(
            completion_ids, logp, entropy, with_entropy, tokens, sequences, given_tokens
        )
    keep = None
    if compact:
        # On the host if all that decides is there: nobody waits for the device then.
        on_host = all(x is None or x.is_cpu for x in (given, *deciding))
        at_hand = deciding if on_host else [here(x) for x in deciding]
        keep = carries_gradient(
            completion_ids,
            given if on_host else live,
            *at_hand,
            group_size=group_size,
            importance_weights=importance_weights,
            modes=objective.terms.modes,
        )
    covered = live if keep is None else here(keep)
    needs = Needs(
        *(
            torch.is_grad_enabled() and x is not None and x.requires_grad
            for x in (flat, *parameters)
        )
    )
    terms, modes = objective.terms, objective.terms.modes
    with_entropy = return_entropy or modes.needs_entropy
    if any(needs):
        everyone = keep
        off_policy = not _phases.known_on_policy(tokens.old_logp, modes)
        by_sequence = modes.needs_sequences and not modes.by_entropy
        # With a frozen head and no bonus the coefficients may come late: no second phase either way.
        trained = needs.parameters or modes.has_bonus or tp_group is not None
        packed = compact and keep is None and cu_seqlens is not None
        if packed and by_sequence and off_policy and trained:
            # Given a mask the operator may wait for the ends of sequences: no second phase then.
            everyone = torch.ones(completion_ids.numel(), dtype=torch.bool)
        arguments = Arguments(
            ids=ids,
            coefficient=None,
            temperature=temperatures,
            inv_temperature=inv_temperature,
            return_entropy=with_entropy,
            modes=modes.key,
            numbers=terms.numbers,
            **tokens._asdict(),
        )
        loss, by_token, logp, entropy, kl, clip, *_ = linear_grpo(
            *(flat, *parameters, *arguments, everyone, *sequences, *options),
            *(list(needs), dw_out),
        )
    else:
        logp, entropy, *_ = linear_logprob_fwd(
            *(flat, *parameters, ids, live, temperatures, inv_temperature),
            *(keep, with_entropy, False, *options),
        )
        of_live = tokens._replace(mask=covered)
        found = _phases.values(logp, entropy, of_live, sequences, terms)
        by_token, kl, clip = found.loss, found.kl, found.clip
        loss = by_token.sum()
    if return_entropy and keep is not None:
        alive = given if given is None or given.device == keep.device else live
        others = ~keep if alive is None else alive & ~keep
        with torch.no_grad():
            rest = linear_logprob_fwd(
                *(flat, *parameters, ids, None, temperatures, inv_temperature),
                *(others, True, False, *options),
            )
            logp, entropy = logp + rest[0], entropy + rest[1]  # each 0 where the other is not
            found = _phases.values(logp, entropy, tokens, sequences, terms)
        by_token, kl, clip, covered = found.loss, found.kl, found.clip, live
    out = loss_output(
        completion_ids,
        by_token,
        logp,
        entropy if with_entropy else None,
        kl,
        clip,
        tokens._replace(mask=covered),
        sequences.share,
    )
    skipped = torch.zeros((), dtype=torch.float32, device=device)
    if keep is not None and keep.numel():
        skipped = 1 - here(keep).float().mean()
    loss = once_differentiable(op, loss, anchors_of(hidden, *parameters))
    return out._replace(loss=loss, metrics={**out.metrics, "skipped_fraction": skipped})


def _in_float64(
    like: Tensor,
    logp: Tensor,
    entropy: Tensor,
    with_entropy: bool,
    tokens: Tokens,
    sequences: Sequences,
    given: dict[str, Any],
) -> LossOutput:
    """The specification's loss of float64 log-probs; the metrics in float32, of every live token."""
    objective = given["objective"]
    rewards, group_size = given.pop("rewards"), given.pop("group_size")
    if rewards is not None:
        given["advantages"] = _double_advantages(rewards, group_size)
        if given["scores"] is None and objective.surrogate == "topr":
            given["scores"] = rewards
    loss = reference.policy_loss(logp.view(like.shape), entropy=entropy.view(like.shape), **given)
    logp, entropy = logp.detach(), entropy.detach()
    found = _phases.values(logp.float(), entropy.float(), tokens, sequences, objective.terms)
    rounded = entropy.float() if with_entropy else None
    out = loss_output(
        *(like, found.loss, logp.float(), rounded, found.kl, found.clip, tokens, sequences.share)
    )
    return out._replace(
        loss=loss,
        logps=logp.view(like.shape),
        entropy=entropy.view(like.shape) if with_entropy else None,
        metrics={
            **out.metrics,
            "skipped_fraction": torch.zeros((), dtype=torch.float32, device=like.device),
        },
    )


def _double_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """`reference.group_advantage` in float64, without the loop over groups that no graph can hold."""
    groups = rewards.double().view(-1, group_size)
    differ = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)
    centred = groups - groups.mean(1, keepdim=True)
    squares = centred.square().sum(1, keepdim=True) / max(group_size - 1, 1)
    return torch.where(differ, centred / (squares.sqrt() + SCORE_EPS), 0).view(-1)


def _scored(tokens: Tokens, ids: Tensor) -> Tokens:
    """With advantages in the place of rewards: compaction wants them before the launch."""
    if tokens.rewards is None:
        return tokens._replace(sequence=None, group_size=1)
    score = group_advantage_fwd(
        tokens.rewards, tokens.group_size, None, "group", operand(SCORE_EPS), True
    )
    advantages = spread(score, tokens.sequence, ids[None] if ids.ndim == 1 else ids)
    return tokens._replace(advantages=advantages, rewards=None, sequence=None, group_size=1)


def carries_gradient(
    like: Tensor,
    mask: Tensor | None,
    advantages: Tensor | None,
    rewards: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    group_size: int | None,
    importance_weights: Tensor | None,
    modes: Modes,
) -> Tensor | None:
    """(N,) bool, where the arguments are: whether a token may have a gradient. None if all may.

    Args:
        like: (B, T) or (N,), for its shape. mask: (N,) bool. The others as in `linear_grpo_loss`, checked.
    """
    N, T = like.numel(), like.shape[-1]
    sequence = None if cu_seqlens is None else reference.sequence_of_token(cu_seqlens, N)

    def per_token(x: Tensor) -> Tensor:
        if x.shape == like.shape:
            return x.reshape(-1)
        x = x.reshape(-1)
        return x[:, None].expand(len(x), T).reshape(-1) if sequence is None else x[sequence]

    conditions = [] if mask is None else [mask]
    if modes.by_entropy:  # every live token's entropy counts
        return mask
    if token_weights is not None:
        conditions.append(token_weights.reshape(-1) != 0)
    if not (modes.has_kl or modes.has_bonus):
        if not modes.has_penalty:  # those do not vanish with the advantage
            if advantages is None:
                assert rewards is not None
                advantages = group_advantage_fwd(
                    kept_whole(rewards), group_size or 1, None, "group", operand(SCORE_EPS), True
                )[:, None]
            conditions.append(per_token(advantages) != 0)
        # They may be on the GPU where the others decide on the host: then they do not decide.
        importance = None if modes.surrogate == "vespo" else importance_weights
        if importance is not None and all(x.device == importance.device for x in conditions):
            conditions.append(per_token(importance) != 0)
    if not conditions:
        return None
    alive = conditions[0]
    for condition in conditions[1:]:
        alive = alive & condition
    if not modes.needs_sequences:
        return alive
    # One token moves all of its sequence, and the ratio is that of all of them.
    if sequence is None:
        alive = alive.view(-1, max(T, 1)).any(1)[:, None].expand(-1, max(T, 1)).reshape(-1)
    else:
        assert cu_seqlens is not None
        count = torch.nn.functional.pad(alive.cumsum(0), (1, 0))[cu_seqlens.long()]
        alive = (count.diff() > 0)[sequence]
    return alive if mask is None else alive & mask


def _check_dw_out(op: str, dw_out: Tensor | None, weight: Tensor, hidden: Tensor) -> None:
    if dw_out is None:
        return
    _arguments.check_tensor(op, "dw_out", dw_out)
    if hidden.dtype == torch.float64:
        raise ValueError(f"{op}: dw_out is float32, and not available with float64 operands")
    if dw_out.dtype != torch.float32 or dw_out.shape != weight.shape:
        raise ValueError(
            f"{op}: dw_out: want float32 {tuple(weight.shape)}, "
            f"got {dw_out.dtype} {_arguments.shape_of(dw_out)}"
        )
    _arguments.check_device(op, "dw_out", dw_out, weight)
    if torch._debug_has_internal_overlap(dw_out) == 1:
        raise ValueError(
            f"{op}: dw_out: its rows overlap, strides {dw_out.stride()}: the gradient is added to each"
        )
    if not weight.requires_grad:
        raise ValueError(f"{op}: dw_out has no effect: weight does not require grad")
    if torch.compiler.is_compiling():
        raise ValueError(f"{op}: dw_out is not available under torch.compile")
