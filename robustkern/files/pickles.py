"""What a pickle would cost, before it is read.

Whatever may be named in it, a pickle of some hundred bytes can take a reader's memory (a number under which to remember
an object is the length of a table) or its time: a tuple of the same tuple twice, forty times over, is small, but its
hash as a key, or its text in an error, visits 2 ** 40 of them.
"""

from __future__ import annotations

import pickletools
from collections.abc import Sequence

__all__ = ["check_pickle"]

#: Objects that a walk through everything may visit, each as often as it is referred to; more of longer data.
MOST_VISITS, VISITS_A_BYTE = 1 << 20, 4
#: What looks something up by name, or by a number that stands for one.
NAMING = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "PERSID"}
#: What makes an object, and what puts more into it.
EMPTY = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
GROWING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


class _Node(list["_Node"]):
    """An object of which only is known what it holds: those that hold others, and how many do not."""

    __slots__ = ("leaves", "visits")
    visits: int | None  # None where that is not known yet

    def __init__(self) -> None:
        super().__init__()
        self.leaves, self.visits = 0, None

    def take(self, others: Sequence[_Node]) -> None:
        inner = [node for node in others if node is not LEAF]
        self.leaves += len(others) - len(inner)
        self.extend(inner)


#: Numbers, texts and all else that holds nothing; and the mark below several objects.
LEAF, MARK = _Node(), _Node()


def check_pickle(data: bytes) -> list[tuple[str, object]]:
    """Return the operations that name something, with what they name, where reading takes no more than it should.

    Time and memory of `pickle` are then linear in the length of the data, and so are those of hashing, comparing or
    printing what comes out.

    Raises
    ------
    ValueError
        If the data end early, are no pickle, hold an object in itself, or would take more.
    """
    named: list[tuple[str, object]] = []
    stack: list[_Node] = []
    kept: dict[int, _Node] = {}
    made: list[_Node] = []
    for code, argument, _ in pickletools.genops(data):
        name = code.name
        if name in NAMING:
            named.append((name, argument))
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(kept) if name == "MEMOIZE" else _number(argument)
            if not 0 <= place <= len(data):
                raise ValueError(f"it remembers an object as number {place}, of {len(data)} bytes")
            kept[place] = _top(stack)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            place = _number(argument)
            if place not in kept:
                raise ValueError(f"it refers to an object number {place}, which is not there")
            stack.append(kept[place])
        elif name == "DUP":
            stack.append(_top(stack))
        elif name == "MARK":
            stack.append(MARK)
        elif name in EMPTY:
            made.append(_Node())
            stack.append(made[-1])
        elif not code.stack_before:
            stack.extend([LEAF] * len(code.stack_after))
        else:
            at = len(stack) - len(code.stack_before)
            if pickletools.markobject in code.stack_before:
                at = _last_mark(stack, name) - code.stack_before.index(pickletools.markobject)
            if at < 0:
                raise ValueError(f"{name} finds nothing to work on")
            taken = [node for node in stack[at:] if node is not MARK]
            del stack[at:]
            if name in GROWING and taken:
                if taken[0] is LEAF:
                    raise ValueError(f"{name} finds nothing to put more into")
                taken[0].take(taken[1:])
                stack.append(taken[0])
            elif code.stack_after:
                made.append(_Node())
                made[-1].take(taken)
                stack.append(made[-1])
    for node in made:
        _visit(node, max(MOST_VISITS, VISITS_A_BYTE * len(data)))
    return named


def _number(argument: object) -> int:
    return argument if isinstance(argument, int) else int(str(argument))


def _top(stack: list[_Node]) -> _Node:
    if not stack or stack[-1] is MARK:
        raise ValueError("it refers to an object that is not there")
    return stack[-1]


def _last_mark(stack: list[_Node], name: str) -> int:
    for i in range(len(stack) - 1, -1, -1):
        if stack[i] is MARK:
            return i
    raise ValueError(f"{name} finds no mark")


def _visit(start: _Node, most: int) -> None:
    """Count the visits of everything that an object holds: of each once, whatever holds it."""
    waiting, entered = [start], set()
    while waiting:
        node = waiting[-1]
        left = [each for each in node if each.visits is None]
        if node.visits is not None:
            waiting.pop()
        elif left:
            if id(node) in entered:
                raise ValueError("it holds an object in itself")
            entered.add(id(node))
            waiting.extend(left)
        else:
            node.visits = 1 + node.leaves + sum(each.visits or 0 for each in node)
            if node.visits > most:
                raise ValueError(f"it holds the same objects in each other, {node.visits} times")
            waiting.pop()
