"""Claims about chance, in a short form for every check and a long one for `make proof`."""

from __future__ import annotations

import pytest


def short_and_long(name: str, short: int, long: int) -> pytest.MarkDecorator:
    """Run a test with few repetitions always, and with many for `make proof`.

    The bound must follow from the number, so that the long form is the sharper one.
    """
    return pytest.mark.parametrize(name, [short, pytest.param(long, marks=pytest.mark.proof)])
