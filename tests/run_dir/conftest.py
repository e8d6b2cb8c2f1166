"""Fixtures of the tests of run folders."""

from ..training.conftest import interrupt  # noqa: F401
