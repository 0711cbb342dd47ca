"""Rule objects and their text form."""

from __future__ import annotations

import ast
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from robustkern.contract.rows import Matrix, Vector
from robustkern.rules.text import make
from robustkern.rules.view import Solution, View

__all__ = ["Aggregator", "Chain", "Mixer", "Rule", "available_rules", "parse_rule", "register"]

MAX_RULE_TEXT = 1000
_RULES: dict[str, type[Rule]] = {}
_PRESETS: dict[str, Rule] = {}
R = TypeVar("R", bound="type[Rule]")


@dataclass(frozen=True)
class Rule:
    """A frozen, comparable description of a rule; ``str(rule)`` is its text form."""

    name: ClassVar[str]
    supports_weights: ClassVar[bool] = False

    def __or__(self, other: Rule) -> Chain:
        """Chain: `other` sees what this rule makes of the rows."""
        if not isinstance(other, Rule):
            return NotImplemented
        return Chain(_steps(self) + _steps(other))

    def __str__(self) -> str:
        """Return the text form, which `parse_rule` reads back."""
        parts = []
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.default is not dataclasses.MISSING and value == spec.default:
                continue
            if isinstance(value, Rule):
                parts.append(str(value))
            else:
                parts.append(f"{spec.name}={value!r}")
        return self.name + (f"({', '.join(parts)})" if parts else "")

    def needs_origin(self) -> bool:
        """Tell whether the rule measures distances to the origin."""
        return False

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Tell whether n and f satisfy what the rule's theorem needs; None without f."""
        return None if f is None else 2 * f < n


class Aggregator(Rule):
    """A rule that combines the rows into one."""

    def solve(self, view: View) -> Solution:
        """Return weights or a window; reads the data only for geometry and distances."""
        raise NotImplementedError  # pragma: no cover


class Mixer(Rule):
    """A rule that replaces the rows by averages of rows."""

    def mixing(self, view: View) -> Matrix:
        """Return the (m, n) weights of the new rows; each of its rows sums to 1."""
        raise NotImplementedError  # pragma: no cover

    def rows_after(self, n: int, f: int | None) -> int:
        """How many rows are left of n."""
        return n


@dataclass(frozen=True)
class Chain(Aggregator):
    """Mixers, then an aggregator: ``NNM() | CTMA(GeometricMedian())``."""

    steps: tuple[Rule, ...]

    name: ClassVar[str] = "chain"

    def __post_init__(self) -> None:
        """Check the order of the steps."""
        for step in self.steps[:-1]:
            if not isinstance(step, Mixer):
                mixers = ", ".join(sorted(name for name, rule in _RULES.items() if issubclass(rule, Mixer)))
                raise ValueError(
                    f"{self}: {step.name} leaves one row, so it must be the last rule of a chain; "
                    f"only {mixers} may come before"
                )

    def __str__(self) -> str:
        """Return the text form."""
        return " | ".join(str(step) for step in self.steps)

    def needs_origin(self) -> bool:
        """Tell whether a step measures distances to the origin."""
        return any(step.needs_origin() for step in self.steps)

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Tell whether every step's condition is met for the rows it sees."""
        met: bool | None = True
        for step in self.steps:
            one = step.bound_met(n, f)
            met = None if one is None or met is None else met and one
            if isinstance(step, Mixer):
                n = step.rows_after(n, f)
        return met

    def solve(self, view: View) -> Solution:
        """Mix in n-space, solve for the mixed rows, and carry the weights back."""
        last = self.steps[-1]
        if not isinstance(last, Aggregator):
            raise ValueError(f"{self}: a chain must end in a rule that combines the rows; append e.g. '| mean'")
        inner, mixing = view, np.eye(view.n)
        for step in self.steps[:-1]:
            assert isinstance(step, Mixer)
            if view.weights is not None:
                raise ValueError(f"{step.name}: weights are not supported (drop weights=, or this rule)")
            weights = step.mixing(inner)
            inner, mixing = inner.remixed(weights), weights @ mixing
        solution = last.solve(inner)
        if solution.weights is None:
            return solution
        kept = None if solution.kept is None else (mixing[solution.kept] != 0).any(axis=0)
        distances = solution.sq_distances if inner.n == view.n else None
        return solution._replace(weights=solution.weights @ mixing, kept=kept, sq_distances=distances)


def _steps(rule: Rule) -> tuple[Rule, ...]:
    return rule.steps if isinstance(rule, Chain) else (rule,)


def check_f(rule: Rule, view: View) -> int:
    """Return f, or raise if it is missing or too large for the rows the rule sees."""
    if view.f is None:
        raise ValueError(f"{rule.name}: f is required, the number of rows that may be Byzantine (pass f= or delta=)")
    if 2 * view.f >= view.n:
        raise ValueError(
            f"{rule.name}: 2*f must be below n; got f={view.f} with n={view.n} rows (lower f, or add rows)"
        )
    return view.f


def require_no_weights(rule: Rule, view: View) -> None:
    """Raise where a rule has no weighted form."""
    if view.weights is not None:
        known = ", ".join(sorted(name for name, r in _RULES.items() if r.supports_weights))
        raise ValueError(f"{rule.name}: weights are not supported (the rules that take them: {known})")


def weights_of(view: View) -> Vector:
    """Return the rows' weights, all 1 where the caller gave none."""
    return np.ones(view.n) if view.weights is None else view.weights


# ---- the text form ---------------------------------------------------------------------------------------------


def register(rule: R) -> R:
    """Make a rule known to the text form under its `name`."""
    _RULES[rule.name] = rule
    _parsed.cache_clear()
    return rule


def register_preset(name: str, rule: Rule) -> None:
    """Give a rule with fixed parameters a name of its own."""
    _PRESETS[name] = rule
    _parsed.cache_clear()


def available_rules() -> tuple[str, ...]:
    """Return the names that `parse_rule` knows, presets included."""
    return tuple(sorted([*_RULES, *_PRESETS]))


def parse_rule(text: str, /) -> Aggregator:
    """Read the text form of a rule: Python call syntax in which bare names are rules.

    Parameters
    ----------
    text : str
        Such as ``"median(even='low')"``, ``"ctma(trimmed_mean)"`` or ``"nnm | krum(neighbours=3)"``; nothing is
        evaluated but names of rules, ``|``, and literal arguments.

    Returns
    -------
    Aggregator
        The rule object; ``str`` of it gives the text back in its shortest form.

    Raises
    ------
    TypeError, ValueError
        If the text is no rule; the message says which part, and what is known.
    """
    if not isinstance(text, str):
        raise TypeError(f"rule must be a rule object or its text form; got {type(text).__name__}")
    if len(text) > MAX_RULE_TEXT:
        raise ValueError(f"rule: the text form may have {MAX_RULE_TEXT} characters; got {len(text)}")
    return _parsed(text)


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Aggregator:
    """Read a rule, once for the many calls of a training run."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
        rule = _rule_of(tree.body, text)
    except (SyntaxError, RecursionError, MemoryError, UnicodeError) as error:
        raise ValueError(
            f"rule: {text!r} is not in Python call syntax, such as 'nnm | ctma(median)' ({error})"
        ) from None
    return as_aggregator(rule)


def as_aggregator(rule: Any) -> Aggregator:
    """Check that a rule combines the rows into one."""
    if isinstance(rule, Aggregator):
        return rule
    if isinstance(rule, Mixer):
        raise ValueError(
            f"rule: {rule} only mixes the rows; end it with a rule that combines them, e.g. '{rule} | mean'"
        )
    raise TypeError(f"rule must be a rule object or its text form; got {type(rule).__name__}")


def _rule_of(node: ast.expr, text: str) -> Rule:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _rule_of(node.left, text) | _rule_of(node.right, text)
    if isinstance(node, ast.Name):
        return _make(node.id, [], {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(keyword.arg is None for keyword in node.keywords):
            raise ValueError(f"rule: {text!r}: '**' is not understood (write the parameters out)")
        arguments = [_argument(a, text) for a in node.args]
        return _make(node.func.id, arguments, {str(k.arg): _argument(k.value, text) for k in node.keywords})
    raise ValueError(f"rule: cannot read {ast.unparse(node)!r} in {text!r}; expected names of rules, calls and '|'")


def _argument(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return _rule_of(node, text)


def _make(name: str, arguments: list[Any], options: dict[str, Any]) -> Rule:
    if name in _PRESETS and not arguments and not options:
        return _PRESETS[name]
    if name in _PRESETS:
        raise ValueError(f"rule: {name!r} takes no parameters; write {_PRESETS[name]} with others")
    return make("rule", available_rules(), _RULES, name, arguments, options)
