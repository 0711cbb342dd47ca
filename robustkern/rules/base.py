"""What a rule is: a frozen description with a text form, and everything that is known of it, in one place.

A class of rules states its name, aliases, cost, what n and f it needs, its constant, its plain NumPy form and its
goals; tables, benchmarks, models and tests are made from that. `register` makes a class known under its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from numpy.typing import NDArray

from robustkern.errors import brief
from robustkern.rules import text
from robustkern.rules.view import Mixture, Solution, View
from robustkern.scalars import as_float, as_int

__all__ = [
    "Aggregator",
    "Chain",
    "Goals",
    "Mixer",
    "Rule",
    "as_aggregator",
    "as_mixers",
    "keep_count",
    "keep_number",
    "mixed_by",
    "parse_rule",
    "register",
]

R = TypeVar("R", bound="type[Rule]")
#: Goals in read passes (float32, all cores, AVX-512) of rules in their text form, by the largest n they hold for.
Goals = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Rule:
    """A frozen, comparable description of a rule; ``str(rule)`` is its text form.

    Attributes
    ----------
    name : str
        In the text form.
    aliases : tuple of str
        Other names that the text form understands.
    form : str
        How it is written, where that is more than its name.
    summary : str
        What it does, in half a line.
    advice : str
        What it is for, and when not.
    reads : str
        How often it reads the n x d data.
    needs : str
        What n and f its guarantee needs; `bound_met` decides it.
    supports_weights : bool
        Whether rows may have weights.
    points : tuple of str
        Points besides the rows that it measures from: "origin", and "centre", which the caller then must give.
    goals : mapping
        See `Goals`; these are also the cases that ``robustkern bench`` measures.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    form: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    advice: ClassVar[str] = ""
    reads: ClassVar[str] = "2"
    needs: ClassVar[str] = "2f < n"
    supports_weights: ClassVar[bool] = False
    points: ClassVar[tuple[str, ...]] = ()
    goals: ClassVar[Goals] = {}

    def __or__(self, other: Rule | str) -> Chain:
        """Chain: `other`, a rule or its text form, sees what this rule makes of the rows."""
        if isinstance(other, str):
            other = text.parse(other)
        return Chain(_steps(self) + _steps(other)) if isinstance(other, Rule) else NotImplemented

    def __ror__(self, other: str) -> Chain:
        """Chain behind a rule in its text form."""
        return text.parse(other) | self if isinstance(other, str) else NotImplemented

    def __str__(self) -> str:
        """Return the text form, which `parse_rule` reads back."""
        parts = []
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value is spec.default or (not hasattr(value, "__array__") and value == spec.default):
                continue
            parts.append(str(value) if isinstance(value, Rule) else f"{spec.name}={value!r}")
        return self.name + (f"({', '.join(parts)})" if parts else "")

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Tell whether n and f satisfy what the rule's theorem needs; None without f."""
        return None if f is None else 2 * f < n


class Aggregator(Rule):
    """A rule that combines the rows into one.

    Attributes
    ----------
    looks_at_no_row : bool
        Whether its solution is the same whatever the rows hold, as a window of each column is.
    """

    looks_at_no_row: ClassVar[bool] = False

    def solve(self, view: View) -> Solution:
        """Return a combination of the rows or a window of their columns, made by a method of the view."""
        raise NotImplementedError(f"{type(self).__name__} must define solve(self, view)")

    def kappa(self, n: int, f: int) -> float | None:
        """Return the constant of (f, kappa)-robustness, None where none is known.

        For any n-f rows of mean m, ``|result - m|^2 <= kappa * (mean of |x_i - m|^2 over them)``.
        """
        return None

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Return what plain NumPy makes of (n, d) rows: the rule as one writes it down."""
        raise NotImplementedError(f"{self} has no plain NumPy form")

    def window(self, n: int, f: int) -> tuple[int, int] | None:
        """Return which ranks [lo, hi) of each column's values the first pass looks for, None where for none."""
        return None

    def rows_read_again(self, n: int, f: int) -> int:
        """Return how many rows the pass that writes the result reads; 0 where the first pass writes it."""
        return n

    def compares(self) -> bool:
        """Tell whether it decides by inner products between rows, so that rows near each other take finer ones."""
        return not self.looks_at_no_row


class Mixer(Rule):
    """A rule that replaces the rows by averages of rows.

    Attributes
    ----------
    blurs : bool
        Whether averages are of most rows, and so near each other that what compares them mostly asks for float64
        products: these are taken at once then. After nnm, of 8 to 64 rows of normal values or gradients, geometric
        medians asked in 23 of 24 cases, Krum in 16; two passes for products took 1.4 to 1.8 times as long as one.
    """

    blurs: ClassVar[bool] = False

    def mixing(self, view: View) -> Mixture:
        """Return the new rows as averages of the view's."""
        raise NotImplementedError(f"{type(self).__name__} must define mixing(self, view)")

    def rows_after(self, n: int, f: int | None) -> int:
        """How many rows are left of n."""
        return n

    def kappa_after(self, kappa: float | None, n: int, f: int) -> float | None:
        """Return the constant of a chain of this rule and one that has `kappa`."""
        return None

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Return what plain NumPy makes of (n, d) rows."""
        raise NotImplementedError(f"{self} has no plain NumPy form")


@dataclass(frozen=True)
class Chain(Aggregator):
    """Mixers, then an aggregator: ``NNM() | CTMA(GeometricMedian())``."""

    steps: tuple[Rule, ...]

    name: ClassVar[str] = "chain"

    def __post_init__(self) -> None:
        """Check the order of the steps."""
        for step in self.steps[:-1]:
            if not isinstance(step, Mixer):
                mixers = ", ".join(name for name, rule in text.registered().items() if issubclass(rule, Mixer))
                raise ValueError(
                    f"{self}: {step.name} leaves one row, so it must be the last rule of a chain; "
                    f"only {mixers} may come before"
                )
        object.__setattr__(self, "points", tuple(dict.fromkeys(p for step in self.steps for p in step.points)))

    def __str__(self) -> str:
        """Return the text form."""
        return " | ".join(str(step) for step in self.steps)

    @property
    def last(self) -> Aggregator:
        """The rule that combines the rows."""
        last = self.steps[-1]
        if not isinstance(last, Aggregator):
            raise ValueError(f"{self}: a chain must end in a rule that combines the rows; append e.g. '| mean'")
        return last

    def bound_met(self, n: int, f: int | None) -> bool | None:
        """Tell whether every step's condition is met for the rows it sees."""
        met: bool | None = True
        for step in self.steps:
            one = step.bound_met(n, f)
            met = None if one is None or met is None else met and one
            if isinstance(step, Mixer):
                n = step.rows_after(n, f)
        return met

    def kappa(self, n: int, f: int) -> float | None:
        """Follow the steps from the last one back."""
        sizes = [n]
        for step in self.steps[:-1]:
            sizes.append(step.rows_after(sizes[-1], f) if isinstance(step, Mixer) else sizes[-1])
        kappa = self.last.kappa(sizes[-1], f)
        for step, size in zip(self.steps[-2::-1], sizes[-2::-1], strict=True):
            kappa = step.kappa_after(kappa, size, f) if isinstance(step, Mixer) else kappa
        return kappa

    def plain(self, x: NDArray[Any], f: int) -> NDArray[Any]:
        """Take one step after the other."""
        for step in self.steps[:-1]:
            x = step.plain(x, f) if isinstance(step, Mixer) else x
        return self.last.plain(x, f)

    def solve(self, view: View) -> Solution:
        """Mix in n-space, solve for the mixed rows, and carry the weights back."""
        if self.last.compares() and any(isinstance(step, Mixer) and step.blurs for step in self.steps):
            view.expect_double()
        inner, mixture = mixed_by(self.steps[:-1], view)
        solution = self.last.solve(inner)
        inner.check(solution, self.last)
        return solution if mixture is None else inner.carried_back(solution, mixture)


def _steps(rule: Rule) -> tuple[Rule, ...]:
    return rule.steps if isinstance(rule, Chain) else (rule,)


def mixed_by(steps: Sequence[Rule], view: View) -> tuple[View, Mixture | None]:
    """Return the view of what mixers, one after the other, make of the rows, and what of the view's rows that is."""
    mixture = None
    for step in steps:
        assert isinstance(step, Mixer)
        view.require_no_weights(step.name)
        mixed = step.mixing(view)
        view, mixture = view.mixed(mixed, step.name), mixed.as_arrays().of(mixture)
    return view, mixture


def as_mixers(rule: Any) -> Chain:
    """Return rules that mix, one after the other, from the object itself or from its text form."""
    if isinstance(rule, str):
        rule = text.parse(rule)
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a rule object or its text form; got {type(rule).__name__}")
    last = _steps(rule)[-1]
    if not isinstance(last, Mixer):
        raise ValueError(f"rule: {last} combines the rows; expected rules that mix them, e.g. 'nnm' (or use aggregate)")
    return Chain(_steps(rule))


def as_aggregator(rule: Any) -> Aggregator:
    """Return a rule that combines the rows, from the object itself or from its text form."""
    if isinstance(rule, str):
        rule = text.parse(rule)
    if isinstance(rule, Aggregator):
        return rule
    if isinstance(rule, Mixer):
        raise ValueError(
            f"rule: {rule} only mixes the rows; end it with a rule that combines them, e.g. '{rule} | mean'"
        )
    what = rule.__name__ + ", a class (make an object of it)" if isinstance(rule, type) else type(rule).__name__
    raise TypeError(f"rule must be a rule object or its text form; got {what}")


def parse_rule(text: str, /) -> Aggregator:
    """Read the text form of a rule: Python call syntax in which bare names are rules.

    Parameters
    ----------
    text : str
        Such as ``"median(even='low')"``, ``"ctma(trimmed_mean)"`` or ``"nnm | krum(neighbours=3)"``; nothing is
        evaluated or imported but names of registered rules, ``|``, and literal arguments.

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
    return as_aggregator(text)


def register(rule: R, /) -> R:
    """Make a class of rules known to the text form, to the command line and to benchmarks; a decorator.

    Parameters
    ----------
    rule : class
        A frozen dataclass derived from `Aggregator` (with ``solve``) or `Mixer` (with ``mixing``), with a `name`.

    Returns
    -------
    class
        The same.

    Raises
    ------
    TypeError, ValueError
        If it is no such class, or its name stands for another rule.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> from typing import ClassVar
    >>> import numpy as np, robustkern as rk
    >>> @rk.register
    ... @dataclass(frozen=True)
    ... class First(rk.Aggregator):
    ...     name: ClassVar[str] = "first"
    ...     def solve(self, view):
    ...         return view.mean_of([0])
    >>> rk.aggregate(np.eye(3), "first")
    array([1., 0., 0.])
    """
    if not (isinstance(rule, type) and issubclass(rule, (Aggregator, Mixer))):
        raise TypeError(f"register: expected a class derived from Aggregator or Mixer; got {rule!r}")
    if not getattr(vars(rule).get("__dataclass_params__"), "frozen", False):
        raise TypeError(f"register: {rule.__name__} must be a frozen dataclass (put @dataclass(frozen=True) under it)")
    text.set_name(getattr(rule, "name", ""), rule, rule.aliases)
    return rule


# ---- parameters ------------------------------------------------------------------------------------------------------


def keep_count(rule: Rule, what: str, least: int, may_be_none: bool = True) -> None:
    """Keep a parameter of a rule as Python's integer; raise where it is none of at least so much."""
    value = getattr(rule, what)
    if value is None and may_be_none:
        return
    count = as_int(value)
    if count is None or count < least:
        kinds = "None or an integer" if may_be_none else "an integer"
        raise ValueError(f"{rule.name}: {what} must be {kinds} of at least {least}; got {brief(value)}")
    object.__setattr__(rule, what, count)


def keep_number(rule: Rule, what: str, is_good: Callable[[float], bool], wanted: str) -> None:
    """Keep a parameter of a rule as Python's number; raise where it is none, or no good one."""
    value = getattr(rule, what)
    number = as_float(value)
    if number is None or not is_good(number):
        raise ValueError(f"{rule.name}: {what} must be {wanted}; got {brief(value)}")
    if type(value) not in (int, float):
        object.__setattr__(rule, what, number)
