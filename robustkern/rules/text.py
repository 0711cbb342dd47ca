"""The text form of rules: Python call syntax in which bare names are rules; and the names that it knows.

Nothing is evaluated or imported: a name stands for a rule that has been registered, arguments are literals or rules.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from robustkern.rules.base import Rule

__all__ = ["available_rules", "known_names", "make", "names_in", "parse", "registered", "set_name"]

MAX_RULE_TEXT = 1000
_RULES: dict[str, type[Rule]] = {}
_PRESETS: dict[str, Rule] = {}  # rules with fixed parameters
_ALIASES: dict[str, str] = {}
T = TypeVar("T")


def set_name(name: str, rule: type[Rule] | Rule, aliases: Sequence[str] = ()) -> None:
    """Let a name stand for a class of rules, or for one rule with its parameters.

    Raises
    ------
    ValueError
        If a name is no identifier, or stands for another rule.
    """
    for each in (name, *aliases):
        if not isinstance(each, str) or not each.isidentifier():
            raise ValueError(f"rule: its name must be a Python identifier; got {each!r}")
        there: Any = _RULES.get(each, _PRESETS.get(each, _ALIASES.get(each)))
        again = isinstance(there, type) and (there.__module__, there.__qualname__) == (
            getattr(rule, "__module__", None),
            getattr(rule, "__qualname__", None),
        )
        if there is not None and not again and there not in (name, rule):
            raise ValueError(f"rule: the name {each!r} stands for {there!r} already (choose another name)")
    if isinstance(rule, type):
        _RULES[name] = rule
    else:
        _PRESETS[name] = rule
    _ALIASES.update(dict.fromkeys(aliases, name))
    parse.cache_clear()


def registered() -> dict[str, type[Rule]]:
    """Return the classes of rules by name."""
    return dict(sorted(_RULES.items()))


def known_names() -> set[str]:
    """Return every name that the text form understands, aliases included."""
    return {*_RULES, *_PRESETS, *_ALIASES}


def available_rules() -> tuple[str, ...]:
    """Return the names that `parse_rule` knows, presets included; aliases are understood besides."""
    return tuple(sorted([*_RULES, *_PRESETS]))


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Rule:
    """Read a rule, once for the many calls of a training run.

    Raises
    ------
    ValueError
        If the text is no rule; the message says which part, and what is known.
    """
    return _rule_of(_tree_of(text), text)


def names_in(text: str) -> tuple[str, ...]:
    """Return the names of rules that a text holds, known or not.

    Raises
    ------
    ValueError
        If the text is not in call syntax.
    """
    nodes = ast.walk(_tree_of(text))
    return tuple(dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name)))


def _tree_of(text: str) -> ast.expr:
    if len(text) > MAX_RULE_TEXT:
        raise ValueError(f"rule: the text form may have {MAX_RULE_TEXT} characters; got {len(text)}")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError, UnicodeError, ValueError) as error:
        raise ValueError(
            f"rule: {text!r} is not in Python call syntax, such as 'nnm | ctma(median)' ({error})"
        ) from None


def _rule_of(node: ast.expr, text: str) -> Rule:
    try:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return _rule_of(node.left, text) | _rule_of(node.right, text)
        if isinstance(node, ast.Name):
            return _make(node.id, [], {})
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if any(keyword.arg is None for keyword in node.keywords):
                raise ValueError(f"rule: {text!r}: '**' is not understood (write the parameters out)")
            given = [keyword.arg for keyword in node.keywords]
            if len(set(given)) < len(given):
                raise ValueError(f"rule: {text!r} gives a parameter twice (write it once)")
            arguments = [_argument(a, text) for a in node.args]
            return _make(node.func.id, arguments, {str(k.arg): _argument(k.value, text) for k in node.keywords})
    except RecursionError as error:
        raise ValueError(f"rule: {text!r} is nested too deeply ({error})") from None
    raise ValueError(f"rule: cannot read {ast.unparse(node)!r} in {text!r}; expected names of rules, calls and '|'")


def _argument(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return _rule_of(node, text)


def _make(name: str, arguments: list[Any], options: dict[str, Any]) -> Rule:
    name = _ALIASES.get(name, name)
    if name in _PRESETS and not arguments and not options:
        return _PRESETS[name]
    if name in _PRESETS:
        raise ValueError(f"rule: {name!r} takes no parameters; write {_PRESETS[name]} with others")
    return make("rule", available_rules(), _RULES, name, arguments, options)


def make(
    what: str,
    known: Sequence[str],
    kinds: Mapping[str, type[T]],
    name: str,
    arguments: list[Any],
    options: dict[str, Any],
) -> T:
    """Make an object of a named dataclass: what the text forms of rules and attacks share.

    Parameters
    ----------
    what : str
        How errors call it: "rule", "attack".
    known : sequence of str
        The names that errors list.
    kinds : mapping of str to dataclass
        By name.
    name, arguments, options
        What was written.

    Raises
    ------
    ValueError
        If there is no such name, or its parameters are others.
    """
    if name not in kinds:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{what}: {name!r} is not known{hint} (known: {', '.join(known)})")
    kind: Any = kinds[name]
    try:
        inspect.signature(kind).bind(*arguments, **options)  # whose errors do not speak of __init__
        made: T = kind(*arguments, **options)
    except TypeError as error:
        fields = ", ".join(spec.name for spec in dataclasses.fields(kind)) or "none"
        raise ValueError(f"{what}: {name}: {error} (its parameters: {fields})") from None
    return made
