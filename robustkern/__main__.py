"""``python -m robustkern`` is the command line."""

from robustkern.cli import main

main()
