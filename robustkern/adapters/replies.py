"""Which replies of a round can be used, told apart alike by all adapters of frameworks whose clients reply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from robustkern.engine import count_of_share
from robustkern.errors import brief, plain
from robustkern.rules import CTMA, Aggregator, Chain, MoNNA
from robustkern.rules.base import as_aggregator
from robustkern.scalars import as_float, as_int

__all__ = ["CAP", "Read", "checked_limit", "checked_rule", "most_of", "sorted_out"]

#: A claimed number of examples above so many times the median of all claims is no honest one; below, claims count at
#: most `CAP` times the median.
ABSURD, CAP = 1000.0, 10.0

Reply = TypeVar("Reply")
Value = TypeVar("Value")


class Read(NamedTuple, Generic[Value]):
    """A reply that could be read.

    Attributes
    ----------
    value
        What it holds.
    form : hashable
        What it must have in common with most others: keys, shapes, dtypes.
    claim : float
        How many examples it says it stands for.
    """

    value: Value
    form: Hashable
    claim: float = 1.0


def sorted_out(
    replies: Iterable[Reply],
    read: Callable[[Reply], Read[Value]],
    sender: Callable[[Reply], str],
    warn: Callable[[str], Any],
) -> tuple[list[Value], int]:
    """Return what the replies that can be used hold, and how many replies cannot, of which each is warned about.

    Parameters
    ----------
    replies : iterable
        Of one round.
    read : callable
        Reads one; whatever is wrong with it is an exception that says so.
    sender : callable
        Who sent one, for the warning.
    warn : callable
        Takes a line without control characters for each that cannot be used: `read` raised, its form is not the one
        that most have, or its claim is absurd.

    Returns
    -------
    list, int
    """
    found: list[tuple[str, Read[Value]]] = []
    reasons: list[str] = []
    for reply in replies:
        name = plain(sender(reply), 60)
        try:
            found.append((name, read(reply)))
        except Exception as error:
            reasons.append(f"{name}: {plain(str(error), 200) or type(error).__name__}")
    usual = Counter(one.form for _, one in found).most_common(1)
    middle = float(np.median([one.claim for _, one in found])) if found else 0.0
    good: list[Value] = []
    for name, one in found:
        if one.form != usual[0][0]:
            reasons.append(f"{name}: its keys, shapes, dtypes or metrics are not those that most have")
        elif one.claim > ABSURD * max(middle, 1.0):
            reasons.append(f"{name}: it claims {one.claim:.3g} examples, where the median is {middle:.3g}")
        else:
            good.append(one.value)
    for reason in reasons:
        warn(f"robustkern: a reply is left out, and counted as a bad one: {reason}")
    return good, len(reasons)


def most_of(claims: Iterable[float]) -> float:
    """Return how many examples a reply counts for at most: `CAP` times the median of all claims."""
    return CAP * float(np.median(list(claims)))


def checked_limit(owner: str, f: int | None, delta: float | None) -> Callable[[int], int]:
    """Return how many of n replies may be bad, as a function of n, by a number or a share of them.

    Raises
    ------
    ValueError
        If not exactly one of them is given, or it is no number in range.
    """
    if (f is None) == (delta is None):
        raise ValueError(f"{owner}: pass f or delta; got f={f}, delta={delta}")
    if delta is not None:
        share = as_float(delta)
        if share is None or not 0 <= share < 0.5:
            raise ValueError(f"{owner}: delta must satisfy 0 <= delta < 0.5; got {brief(delta)}")
        return lambda n: count_of_share(share, n)
    count = as_int(f)
    if count is None or count < 0:
        raise ValueError(f"{owner}: f must be an integer of at least 0; got {brief(f)}")
    return lambda n: count


def checked_rule(owner: str, rule: Aggregator | str, has_centre: bool) -> Aggregator:
    """Return a rule for replies, which come in any order.

    Raises
    ------
    TypeError, ValueError
        If it is none, trusts a row by its number, or measures from a centre where nobody gives one.
    """
    found = as_aggregator(rule)
    remedy = "monna(pivot='centre')" if has_centre else "ctma(median)"
    if _trusts_a_row(found):
        raise ValueError(
            f"{owner}: {found} trusts a row by its number, which would be whoever replies so soon (take {remedy})"
        )
    if "centre" in found.points and not has_centre:
        raise ValueError(f"{owner}: {found} measures from a centre, which nobody gives here (take {remedy})")
    return found


def _trusts_a_row(rule: object) -> bool:
    if isinstance(rule, Chain):
        return any(map(_trusts_a_row, rule.steps))
    return _trusts_a_row(rule.anchor) if isinstance(rule, CTMA) else isinstance(rule, MoNNA) and rule.pivot != "centre"
