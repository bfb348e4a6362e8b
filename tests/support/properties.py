"""The names of hypothesis that tests use. Without hypothesis (a bare GPU machine) these tests are skipped."""

import pytest

try:
    from hypothesis import HealthCheck, given
    from hypothesis import settings as _settings
    from hypothesis import strategies as st

    def settings(max_examples):
        # The same examples in every run: what fails once fails again. Fixtures are fine here, `backend` and
        # `device` do not change between examples.
        return _settings(
            max_examples=max_examples,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )

except ImportError:

    class _Strategies:
        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    st = _Strategies()

    def settings(max_examples):
        return lambda test: test

    def given(**strategies):
        def skipped(test):
            def needs_hypothesis():
                pytest.skip("hypothesis is not installed")

            needs_hypothesis.__name__ = test.__name__
            return needs_hypothesis

        return skipped


__all__ = ["given", "settings", "st"]
