"""Code that the adapters share: how options are read, and what adapters may do to a loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo_fast import Objective
from grpo_fast.integrations.shared.call import LossCall, token_average
from grpo_fast.integrations.shared.options import entry, read, read_options
from grpo_fast.loss import policy_loss
from tests.support.hosts import assert_adapter_only_scales


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
@pytest.mark.parametrize(
    ("where", "given", "want"),
    [
        (entry("a"), {"a": 0.0}, 0.0),
        (entry("a"), {"a": None}, None),
        (entry("a", "b"), {"a": 0, "b": 2}, 0),
        (entry("a", "b"), {"a": None, "b": 2}, 2),
        (entry("a", "b"), {"b": 2}, 2),
        (entry("a", missing=3), {}, 3),
        (
            entry("a", missing=3),
            {"a": None},
            None,
        ),  # the host's way to turn it off, not its default
        (entry("a", missing=None), {}, None),
        (entry("a", none=4), {"a": None}, 4),
        (entry("a", none=4), {"a": False}, False),
    ],
)
def test_where_an_option_is(kind, where, given, want):
    found = read_options(kind(**given), {"option": where})["option"]
    assert found == want
    assert type(found) is type(want)


@pytest.mark.parametrize("where", [entry("a"), entry("b", "a"), entry("a", none=4)])
def test_an_option_that_is_nowhere(where):
    secret = SimpleNamespace(api_key="123")
    with pytest.raises(AttributeError, match="has no 'a'") as error:
        read_options(secret, {"option": where})
    assert "123" not in str(error.value)
    with pytest.raises(AttributeError, match=r"has no 'a\.b': a SimpleNamespace has no 'b'"):
        read(SimpleNamespace(a=secret), "a.b")


def test_what_an_adapter_may_do_to_a_loss():
    logps = torch.randn(2, 3, requires_grad=True)
    loss = policy_loss(logps, advantages=torch.randn(2, 3), objective=Objective()).loss
    for fine in (2 * loss, loss / torch.tensor(3.0) + loss, loss - 0.5):
        assert_adapter_only_scales(fine)
    for own in (loss.exp(), loss * loss, loss + logps.mean(), loss.clamp(max=1)):
        with pytest.raises(AssertionError, match="in the adapter's"):
            assert_adapter_only_scales(own)
    with pytest.raises(AssertionError, match="no gradient"):
        assert_adapter_only_scales(loss.detach())


@pytest.mark.parametrize("count", [3, np.float32(3), torch.tensor(3), torch.tensor([3.0])], ids=str)
def test_denominators_of_any_kind(count):
    logps = torch.randn(2, 3)
    given = {"logps": logps, "advantages": torch.randn(2, 3), "mask": torch.ones(2, 3)}
    one, other = (
        LossCall(preset="verl/gpg", average=token_average(n, 2.0), old_logps=None, **given).out.loss
        for n in (1.0, count)
    )
    torch.testing.assert_close(3 * other, one)
