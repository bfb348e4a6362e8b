"""The stages of a step in words and formulas, which the page and the terminal share."""

# ruff: noqa: RUF001  # the symbols of formulas

from typing import NamedTuple

from grpo_fast.trainer.explain.record import StepRecord


class Stage(NamedTuple):
    """One stage.

    Attributes:
        name: its key in the page.
        title: a few words.
        text: paragraphs that explain it.
        formula: as plain text.
        mathml: the same formula as MathML.
        symbols: pairs of a symbol and its meaning.
        task: what to try with the sliders of the page.
    """

    name: str
    title: str
    text: list[str]
    formula: str
    mathml: str
    symbols: list[tuple[str, str]]
    task: str


def i(name: str) -> str:
    """Return a symbol as MathML."""
    return f"<mi>{name}</mi>"


def n(number: str) -> str:
    """Return a number as MathML."""
    return f"<mn>{number}</mn>"


def o(operator: str) -> str:
    """Return an operator as MathML."""
    fixed = ' stretchy="false"' if operator in "()" else ""
    return f"<mo{fixed}>{operator}</mo>"


def words(text: str) -> str:
    """Return words inside a formula as MathML."""
    return f"<mtext>{text}</mtext>"


def row(*parts: str) -> str:
    """Return MathML parts as one."""
    return f"<mrow>{''.join(parts)}</mrow>"


def sub(base: str, *index: str) -> str:
    """Return a symbol with an index as MathML."""
    return f"<msub>{i(base)}{row(*index)}</msub>"


def power(base: str, exponent: str) -> str:
    """Return a power as MathML."""
    return f"<msup>{base}{exponent}</msup>"


def over(top: str, bottom: str) -> str:
    """Return a fraction as MathML."""
    return f"<mfrac>{row(top)}{row(bottom)}</mfrac>"


def call(name: str, *arguments: str) -> str:
    """Return a function and its arguments as MathML."""
    listed = o(",").join(arguments)
    return row(i(name), o("&#x2061;"), o("("), listed, o(")"))


def math(*parts: str) -> str:
    """Return a formula in a line of its own."""
    return f'<math display="block">{"".join(parts)}</math>'


IT = i("i") + o(",") + i("t")
ELL = sub("ℓ", IT)
OLD = f"<msubsup>{i('ℓ')}{row(IT)}{i('old')}</msubsup>"
REF = f"<msubsup>{i('ℓ')}{row(IT)}{i('ref')}</msubsup>"
A, RHO, W, Q = sub("A", i("i")), sub("ρ", IT), sub("w", IT), sub("q", IT)
LOSS = f"<msubsup>{i('L')}{row(IT)}{i('clip')}</msubsup>"
BOUND = f"<msub><mover>{i('ρ')}{o('¯')}</mover>{row(IT)}</msub>"
LOW, HIGH = sub("ε", i("low")), sub("ε", i("high"))
# The weight of a token for each reduction: as text, as MathML, and in words.
WEIGHTS = {
    "token_mean": (
        "w = 1 / N",
        math(W, o("="), over(n("1"), i("N"))),
        "N is the number of tokens of the whole group: every token counts alike",
    ),
    "sequence_mean": (
        "w_it = 1 / (G n_i)",
        math(W, o("="), over(n("1"), row(i("G"), sub("n", i("i"))))),
        "n_i is the number of tokens of completion i: every completion counts alike",
    ),
    "sequence_sum": (
        "w = 1 / G",
        math(W, o("="), over(n("1"), i("G"))),
        "the losses of the tokens of a completion are added up",
    ),
    "fixed_length": (
        "w = 1 / (G L)",
        math(W, o("="), over(n("1"), row(i("G"), i("L")))),
        "L is the length limit of a completion: a constant, so that length has no influence",
    ),
}


def advantage_stage(record: StepRecord) -> Stage:
    """Return the stage of the advantages, which depends on how rewards are scaled."""
    scaled = record.scale_rewards != "none"
    centred = sub("r", i("i")) + o("−") + call("mean", i("r"))
    below = call("std", i("r")) + o("+") + power(n("10"), row(o("−"), n("4")))
    right = over(centred, below) if scaled else centred
    return Stage(
        "advantage",
        "Advantages",
        [
            "The advantage compares each reward with the other rewards of the same prompt. No second "
            "model has to predict a value: the group is the baseline.",
            "A positive advantage makes the tokens of the completion more likely. A negative one makes "
            "them less likely. If all rewards are equal, all advantages are 0 and the group teaches "
            "nothing.",
        ],
        "A_i = (r_i − mean(r)) / (std(r) + 10^-4)" if scaled else "A_i = r_i − mean(r)",
        math(A, o("="), right),
        [
            ("A_i", "advantage of completion i; all its tokens share it"),
            ("r_i", "reward of completion i"),
            ("mean(r)", "mean of the G rewards"),
            *([("std(r)", "standard deviation of the G rewards, with G − 1")] if scaled else []),
        ],
        "Move one reward up. Its advantage rises and all others fall. Then press “Make all rewards "
        "equal”: the bars are gone.",
    )


def gradient_stage(record: StepRecord) -> Stage:
    """Return the stage of the coefficients, which depends on the reduction."""
    reduction = str(record.objective["reduction"])
    plain, weight, meaning = WEIGHTS[reduction]
    chosen = sub("p", i("o"))
    derivative = over(row(o("∂"), i("L")), row(o("∂"), ELL))
    policy = o("−") + A + RHO + sub("k", IT)
    kl = i("β") + o("(") + n("1") + o("−") + power(i("e"), Q) + o(")")
    logit = over(row(o("∂"), i("L")), row(o("∂"), sub("z", i("o"))))
    return Stage(
        "gradient",
        "Gradients",
        [
            "The coefficient of a token is the derivative of the loss in its log-prob. A negative "
            "coefficient raises the log-prob, because the optimiser goes down the loss. A positive one "
            "lowers it. Where the coefficient is 0, the token has no part in the update; but all tokens "
            "share the weights, so its log-prob may still move with those of others.",
            "From there the gradient goes on to the logits. The logit of the sampled token gets "
            "the coefficient times (1 − p): a token that is nearly certain has little left to learn. All "
            "other logits share the same amount with the opposite sign.",
        ],
        "c_it = ∂L/∂ℓ_it\nc_it = w_it (−A_i ρ_it k_it + β (1 − e^q_it))\n"
        f"{plain}\n∂L/∂z_o = c_it (1 − p_o) / T",
        math(sub("c", IT), o("="), derivative)
        + math(sub("c", IT), o("="), W, o("("), policy + o("+") + kl, o(")"))
        + weight
        + math(logit, o("="), sub("c", IT), over(row(n("1"), o("−"), chosen), i("T"))),
        [
            ("L", "loss of the group"),
            ("c", "coefficient of a token"),
            ("w", f"weight of a token, by reduction={reduction}; {meaning}"),
            ("k", "0 for a token that the clip stops, else 1"),
            ("z_o, p_o", "logit and probability of the sampled token"),
            ("T", f"temperature of the samples, here {record.temperature:g}"),
        ],
        "Choose a token with a click or with the arrow keys: all factors of its coefficient are shown.",
    )


SAMPLE = Stage(
    "sample",
    "Completions",
    [
        "The policy is the model that is trained. It samples G completions of one prompt, token "
        "by token. It draws each token from its own probabilities, so that the completions differ.",
        "The log-prob of every sampled token is kept: the update needs it.",
    ],
    "o_i ~ π_old(· | q),  i = 1 ... G",
    math(
        sub("o", i("i")) + o("∼") + sub("π", i("old")),
        o("(") + o("·") + o("|") + i("q") + o(")") + o(","),
        i("i") + o("=") + n("1") + o("…") + i("G"),
    ),
    [
        ("q", "prompt"),
        ("o_i", "completion i"),
        ("G", "number of completions in the group"),
        ("π_old", "policy that sampled: the weights before the first update"),
    ],
    "Lower G: the step then uses the first G completions alone.",
)
REWARD = Stage(
    "reward",
    "Rewards",
    [
        "Reward functions score each finished completion. Their weighted sum is its reward. "
        "The update sees nothing else of it.",
    ],
    "r_i = sum over k of v_k R_k(q, o_i)",
    math(
        sub("r", i("i")) + o("=") + f"<munder>{o('∑')}{i('k')}</munder>",
        sub("v", i("k")) + sub("R", i("k")),
        o("(") + i("q") + o(",") + sub("o", i("i")) + o(")"),
    ),
    [
        ("r_i", "reward of completion i"),
        ("R_k, v_k", "reward function k and its weight"),
    ],
    "Change the reward of a completion with its slider, and follow it through the next stages.",
)
RATIO = Stage(
    "ratio",
    "Ratios",
    [
        "The ratio says how much more likely a token is now than when it was sampled. In the "
        "first update the policy is still the one that sampled, so every ratio is exactly 1.",
        "Every further update on the same completions moves the ratios away from 1.",
    ],
    "ρ_it = π(o_it) / π_old(o_it) = exp(ℓ_it − ℓ_it^old)",
    math(
        RHO + o("="),
        over(
            i("π") + o("(") + sub("o", IT) + o(")"),
            sub("π", i("old")) + o("(") + sub("o", IT) + o(")"),
        ),
        o("=") + call("exp", ELL + o("−") + OLD),
    ),
    [
        ("ρ", "ratio of token t of completion i"),
        ("π", "policy as it is now, before this update"),
        ("ℓ, ℓ^old", "log-probs of the token now, and when it was sampled"),
    ],
    "Move “Update” from 1 to the next: the ratios spread.",
)
CLIP_OF_RATIO = call("clip", RHO, n("1") + o("−") + LOW, n("1") + o("+") + HIGH)
CLIP = Stage(
    "clip",
    "Clip",
    [
        "The loss of a token is −ρ A as long as the ratio is near 1. If the update has already "
        "moved a token past the range in the direction of its advantage, the clip makes its loss "
        "constant. Such a token is stopped: only the KL, if there is one, still sends a gradient.",
        "A token outside the range on the other side is not stopped. Its gradient leads back. "
        "Epsilon sets the width of the range: a small one stops tokens early, a large one lets "
        "one batch move the policy far.",
    ],
    "L_it^clip = −min(ρ_it A_i, ρ̄_it A_i)\nρ̄_it = clip(ρ_it, 1 − ε_low, 1 + ε_high)",
    math(LOSS, o("="), o("−"), call("min", RHO + A, BOUND + A))
    + math(BOUND, o("="), CLIP_OF_RATIO),
    [
        ("ρ̄", "ratio within the clip range"),
        ("ε_low, ε_high", "how far the ratio may fall and rise before the clip acts"),
        ("clip(x, a, b)", "x, but at least a and at most b"),
    ],
    "Make both epsilons small: more tokens are stopped. The first update stops none, whatever "
    "epsilon is.",
)
UPDATE = Stage(
    "update",
    "Update",
    [
        "The gradients of all tokens add up, and the optimiser changes the weights. Then "
        "the loss on the same completions is lower, as a rule: it is computed here before and "
        "after the update.",
        "After the update the same prompt is sampled again, with the same random numbers. So a "
        "completion differs only where the probabilities do. One group is a small sample: its "
        "mean reward may also fall. Training repeats the step many times, on many prompts.",
    ],
    "L = sum over i, t of w_it (L_it^clip + β k3_it)",
    math(
        i("L") + o("=") + f"<munder>{o('∑')}{row(IT)}</munder>",
        W + o("(") + LOSS + o("+") + i("β") + sub("k3", IT) + o(")"),
    ),
    [("L", "loss of the group"), ("w, β, k3", "as in the stages before")],
    "The sliders change the loss. They do not train again: the log-probs after the "
    "update, and the new completions, are those of the recorded step.",
)


def kl_stage(record: StepRecord) -> Stage:
    """Return the stage of the KL, which names the reference."""
    return Stage(
        "kl",
        "KL",
        [
            "The KL term keeps the policy near a reference, usually the model before GRPO. The "
            "estimator k3 needs only the two log-probs of the sampled token. It is 0 where both are "
            "equal, and never negative.",
            "Beta sets its weight. With beta = 0 the loss has no such term, and the reference is "
            "not needed.",
        ],
        "k3_it = e^q_it − q_it − 1\nq_it = ℓ_it^ref − ℓ_it",
        math(sub("k3", IT), o("="), power(i("e"), Q), o("−") + Q + o("−") + n("1"))
        + math(Q, o("="), REF, o("−"), ELL),
        [
            ("k3, q", "estimate of the divergence from the reference, in nats"),
            ("ℓ^ref", f"log-prob of the token by the reference: {record.source.reference}"),
            ("β", "weight of the KL term"),
        ],
        "Raise beta: the KL adds to the loss, and the coefficients in the next stage change.",
    )


def stages(record: StepRecord) -> list[Stage]:
    """Return the stages of a step in their order."""
    return [
        SAMPLE,
        REWARD,
        advantage_stage(record),
        RATIO,
        CLIP,
        kl_stage(record),
        gradient_stage(record),
        UPDATE,
    ]
