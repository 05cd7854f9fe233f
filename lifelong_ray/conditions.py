"""Conditions on one number, as Argo Rollouts writes them: ``result >= 0.95 && result < 2``.

Comparisons of ``result`` (or ``result[0]``, as its Prometheus metrics have it) with numbers, put
together with ``&&``, ``||``, ``!`` and brackets. Text becomes a tree that is walked; nothing is
executed.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

_MAX_CHARS = 500
_LARGEST = 1e300  # A whole number may be larger than any float.
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


@dataclass(frozen=True)
class Condition:
    """A condition that was understood; see `parse`."""

    text: str
    _tree: ast.expr

    @staticmethod
    def parse(text: str) -> Condition:
        """Read a condition.

        >>> Condition.parse("result > 0.5 && result[0] <= 1").holds(0.75)
        True

        Raises:
            ValueError: If it is not one.
        """
        if len(text) > _MAX_CHARS:
            raise ValueError(f"a condition of {len(text)} characters; {_MAX_CHARS} are the most")
        python = text.replace("&&", " and ").replace("||", " or ")
        python = re.sub(r"!(?!=)", " not ", python)
        try:
            tree = ast.parse(python.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(_told(text)) from None
        if not _is_condition(tree):
            raise ValueError(_told(text))
        return Condition(text, tree)

    def holds(self, result: float) -> bool:
        """Whether it is true of a number; of NaN nothing is."""
        return not math.isnan(result) and _truth(self._tree, result)


def _told(text: str) -> str:
    return (
        f"{text!r} is not a condition; compare result with numbers, as in "
        "'result >= 0.95 && result < 2'"
    )


def _is_condition(tree: ast.expr) -> bool:
    if isinstance(tree, ast.BoolOp):
        return all(map(_is_condition, tree.values))
    if isinstance(tree, ast.UnaryOp):
        return isinstance(tree.op, ast.Not) and _is_condition(tree.operand)
    if not isinstance(tree, ast.Compare):
        return False
    sides = [tree.left, *tree.comparators]
    known = all(type(comparison) in _COMPARISONS for comparison in tree.ops)
    return known and all(map(_is_value, sides)) and any(map(_is_result, sides))


def _is_value(tree: ast.expr) -> bool:
    return _is_result(tree) or _number(tree) is not None


def _is_result(tree: ast.expr) -> bool:
    if isinstance(tree, ast.Subscript):
        first = isinstance(tree.slice, ast.Constant) and tree.slice.value in (0,)
        return first and _is_result(tree.value) and not isinstance(tree.value, ast.Subscript)
    return isinstance(tree, ast.Name) and tree.id == "result"


def _number(tree: ast.expr) -> float | None:
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        value = _number(tree.operand)
        return None if value is None else -value
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int | float):
        is_number = not isinstance(tree.value, bool) and abs(tree.value) < _LARGEST
        return float(tree.value) if is_number else None
    return None


def _truth(tree: ast.expr, result: float) -> bool:
    if isinstance(tree, ast.BoolOp):
        together = all if isinstance(tree.op, ast.And) else any
        return together(_truth(value, result) for value in tree.values)
    if isinstance(tree, ast.UnaryOp):
        return not _truth(tree.operand, result)
    assert isinstance(tree, ast.Compare)
    values = [_value(side, result) for side in (tree.left, *tree.comparators)]
    return all(
        _COMPARISONS[type(comparison)](before, after)
        for comparison, before, after in zip(tree.ops, values, values[1:], strict=False)
    )


def _value(tree: ast.expr, result: float) -> float:
    number = _number(tree)
    return result if number is None else number
