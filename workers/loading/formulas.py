"""Formulas over named numbers, as OpenAI's ``calculate_output`` has them: arithmetic and a few functions, no code."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

LONGEST = 1000
_DEEPEST = 50
_OPERATORS: dict[type[ast.AST], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
_FUNCTIONS: dict[str, tuple[Callable[..., float], int, int]] = {
    "min": (min, 2, 16),
    "max": (max, 2, 16),
    "abs": (abs, 1, 1),
    "floor": (lambda value: float(math.floor(value)), 1, 1),
    "ceil": (lambda value: float(math.ceil(value)), 1, 1),
    "exp": (math.exp, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
    "log": (math.log, 1, 1),
}
FUNCTIONS = tuple(_FUNCTIONS)


class Formula:
    """A formula that was read. Raises ValueError for one that is more than arithmetic."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise ValueError(f"it is longer than {LONGEST} signs")
        try:
            self._tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise ValueError("it cannot be read") from None
        self.names: set[str] = set()
        self._check(self._tree)

    def __call__(self, values: Mapping[str, float]) -> float:
        """The result, a finite number. Raises ArithmeticError or ValueError where there is none."""
        result = float(self._value(self._tree, values))
        if not math.isfinite(result):
            raise ArithmeticError("the result is not finite")
        return result

    def _check(self, node: Any, depth: int = 0) -> None:
        if depth > _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
        if isinstance(node, ast.Constant):
            value: Any = node.value
            if type(value) not in (int, float) or abs(value) > 1e12:
                raise ValueError("its numbers are plain ones, up to 1e12")
            return
        if isinstance(node, ast.Name):
            self.names.add(node.id)
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            self._check(node.left, depth + 1)
            self._check(node.right, depth + 1)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            self._check(node.operand, depth + 1)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            if node.func.id not in _FUNCTIONS:
                raise ValueError(f"there is no function {node.func.id}; there are {', '.join(_FUNCTIONS)}")
            _, fewest, most = _FUNCTIONS[node.func.id]
            if not fewest <= len(node.args) <= most:
                raise ValueError(f"{node.func.id} takes {fewest if fewest == most else f'{fewest} to {most}'} numbers")
            for argument in node.args:
                self._check(argument, depth + 1)
        else:
            raise ValueError("it may hold numbers, names of graders, + - * / ^ and brackets")

    def _value(self, node: Any, values: Mapping[str, float]) -> float:
        match node:
            case ast.Constant():
                number: Any = node.value
                return float(number)
            case ast.Name():
                return values[node.id]
            case ast.BinOp():
                return _OPERATORS[type(node.op)](self._value(node.left, values), self._value(node.right, values))
            case ast.UnaryOp():
                value = self._value(node.operand, values)
                return -value if isinstance(node.op, ast.USub) else value
            case _:
                function = _FUNCTIONS[node.func.id][0]
                return function(*(self._value(argument, values) for argument in node.args))
