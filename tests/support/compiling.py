"""What tests of compiled code ask for: inductor, on a CPU, for calls of any size."""

import pytest

from grpo_fast.torch_kernels import compiled


def compile_every_call(monkeypatch, device):
    """Compile calls of any size, or skip the test where nothing is compiled."""
    if device != "cpu" or compiled.why_not():
        pytest.skip(f"nothing is compiled: {compiled.why_not() or 'the kernels run'}")
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    monkeypatch.setenv("GRPO_FAST_COMPILE", "1")
