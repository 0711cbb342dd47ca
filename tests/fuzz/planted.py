"""A fault that only a fuzzer finds which sees what it has reached: each byte of a word leads one branch further."""

from __future__ import annotations

from fuzz.targets import Target

WORD = b"fuzz"


def _run(data: bytes) -> bool:
    """Fail behind the word; each `if` is a branch of its own."""
    if data[:1] != WORD[:1]:
        return False
    if data[1:2] != WORD[1:2]:
        return False
    if data[2:3] != WORD[2:3]:
        return False
    if data[3:4] != WORD[3:4]:
        return False
    raise AssertionError("found")


PLANTED = {"planted": Target(_run, lambda: [b"0"])}
