"""``python -m robustkern.rules``: print docs/rules.md."""

from robustkern.rules import comparison

print(comparison(), end="")
