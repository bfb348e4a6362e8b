"""docs/metrics.md has a row for each metric that the code returns, and no other."""

import re
from pathlib import Path

import pytest
import torch

from grpo_fast import (
    Objective,
    fold_statistics,
    grpo_loss,
    linear_grpo_loss,
    metrics_from,
    policy_loss,
)
from grpo_fast.diagnostics import TokenDiagnostics
from grpo_fast.metrics import STATISTICS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
OF_CALLS, OF_STEPS, OF_TOKENS, _ = PAGE.split("\n## ")[1:]  # test_loops has the last
IDS, A = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([1.0, -1.0])
LOGITS = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
OLD = -torch.rand(2, 3, generator=torch.Generator().manual_seed(1)) - 1
NONE = torch.zeros(2, 3, dtype=torch.bool)
HEAD = torch.eye(9)


def rows(text, column=0):
    return [
        re.fullmatch(r"`(\w+)`", cells[column])[1]
        for cells in (line.strip("| ").split(" | ") for line in text.splitlines())
        if len(cells) > column and re.fullmatch(r"`\w+`", cells[column])
    ]


OBJECTIVES = [Objective(), Objective(ratio="sequence"), Objective(entropy_coef=0.1)]
OBJECTIVES += [Objective(surrogate=x) for x in ("dppo_tv", "vespo", "gmpo", "reinforce")]


def calls(objective, **given):
    given = {"advantages": A, "old_logps": OLD, "objective": objective} | given
    yield grpo_loss(LOGITS, IDS, **given).metrics
    yield linear_grpo_loss(LOGITS, HEAD, IDS, **given).metrics
    yield grpo_loss(LOGITS, IDS, **given, return_entropy=True).metrics
    yield policy_loss(OLD + 0.1, **given, entropy=-OLD).metrics


def test_every_metric_has_a_row():
    found = {
        name
        for objective in OBJECTIVES
        for ref in (None, OLD)
        for metrics in calls(objective, ref_logps=ref)
        for name in metrics
    }
    assert found == set(rows(OF_CALLS)), found ^ set(rows(OF_CALLS))
    assert set(metrics_from(torch.zeros(16))) == found - {"skipped_fraction"}


def test_the_metrics_without_a_live_token():
    cells = [line.strip("| ").split(" | ") for line in OF_CALLS.splitlines() if " | " in line]
    said = {x[0].strip("`"): x[2] for x in cells if x[0].startswith("`")}
    for metrics in calls(OBJECTIVES[0], mask=NONE, ref_logps=OLD):
        for name in metrics.keys() - {"skipped_fraction"}:
            assert metrics[name] == float(said[name]), name


@pytest.mark.parametrize("name", ["kl", "entropy", "skipped_fraction"])
def test_what_may_be_absent(name):
    absent = re.search(r"\*\*Absent\.\*\*.*?\n- ", OF_CALLS, re.DOTALL)[0]
    assert f"`{name}`" in absent
    assert name not in grpo_loss(LOGITS, IDS, advantages=A).metrics


def test_the_formulas():
    """Each formula, by hand, on a batch that is large enough to tell them apart."""
    d, w = torch.tensor([[0.5, -0.3, 0.1], [-0.6, 0.4, 0.0]]), torch.tensor([3.0, 0.25])
    out = policy_loss(OLD + d, advantages=A, old_logps=OLD, ref_logps=OLD, importance_weights=w)
    r, rho = d.exp(), d.exp() * w[:, None]
    want = {
        "ratio_mean": r.mean(),
        "clip_fraction_low": 1 / 6,
        "clip_fraction_high": 1 / 6,
        "approx_kl_k1": -d.mean(),
        "approx_kl_k3": (r - 1 - d).mean(),
        "kl": ((-d).exp() - 1 + d).mean(),
        "importance_weight_mean": w.mean(),
        "importance_weight_out_of_range": 1.0,
        "effective_sample_size": rho.sum() ** 2 / (6 * (rho**2).sum()),
    }
    for name, x in want.items():
        torch.testing.assert_close(out.metrics[name], torch.as_tensor(x), msg=name)
    vespo = Objective(surrogate="vespo")
    given = {"advantages": A, "old_logps": OLD, "importance_weights": w}
    assert policy_loss(OLD + d, **given, objective=vespo).metrics["importance_weight_mean"] == 1


def test_statistics_and_diagnostics_have_rows():
    assert rows(OF_STEPS, 1) == list(STATISTICS)
    assert rows(OF_TOKENS.partition("\n")[2]) == list(TokenDiagnostics._fields)
    assert STATISTICS.index("loss") == 1
    out = grpo_loss(LOGITS, IDS, advantages=A)
    torch.testing.assert_close(out.statistics[1], out.loss)


def test_errors_name_the_statistics():
    for shape in ((17,), (1, 16), ()):
        with pytest.raises(ValueError, match=r"metrics_from: statistics: want \(16,\), got"):
            metrics_from(torch.zeros(shape))
    with pytest.raises(TypeError, match="metrics_from: statistics: want real numbers"):
        metrics_from(torch.zeros(16, dtype=torch.complex64))
    with pytest.raises(TypeError, match="fold_statistics: gathered: want real numbers"):
        fold_statistics(torch.zeros(2, 16, dtype=torch.complex64))


def test_log_probs_that_were_given_come_back_as_they_are():
    logps = torch.tensor([[-1.0, torch.nan]], dtype=torch.bfloat16)
    out = policy_loss(logps, advantages=torch.ones(1), mask=torch.tensor([[1, 0]]))
    torch.testing.assert_close(out.logps, logps.float(), equal_nan=True)
    assert out.loss.isfinite()


def test_the_sample_size_of_small_ratios():
    """It does not depend on a common factor of the ratios."""
    d = torch.tensor([[-36.0, -36.0, -37.0]])
    far, near = (
        policy_loss(
            torch.zeros(1, 3) - 40 + x,
            advantages=torch.ones(1),
            old_logps=torch.full((1, 3), -40.0),
        )
        for x in (d, d + 36)
    )
    sizes = [x.metrics["effective_sample_size"] for x in (far, near)]
    torch.testing.assert_close(*sizes)
    assert sizes[0] > 0.8
