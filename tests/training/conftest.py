"""Fixtures of the tests of training."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from avatarl.training.optim import Optimisers

from .runs import Interrupted


@pytest.fixture
def interrupt(monkeypatch) -> Callable[[int], None]:
    """``interrupt(n)``: the n-th optimiser step from now on fails, and after that all work again."""

    def arm(calls: int) -> None:
        real, count = Optimisers.step, 0

        def step(self: Optimisers, *arguments) -> float:
            nonlocal count
            count += 1
            if count == calls:
                monkeypatch.setattr(Optimisers, "step", real)
                raise Interrupted
            return real(self, *arguments)

        monkeypatch.setattr(Optimisers, "step", step)

    return arm
