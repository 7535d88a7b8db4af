"""The output of the demo: plain text in two columns, in colour only on a terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from itertools import zip_longest

from tests.wire import Message, Recording

WIDTH = 98
COLUMN = 47

BOLD, DIM, GREEN, YELLOW = "1", "2", "32", "33"


def show(line: str = "", style: str = "") -> None:
    """Print a line.

    :param line: The line.
    :param style: The style of the line on a terminal.
    """
    print(styled(line, style), flush=True)


def show_columns(left: str, right: str, styles: tuple[str, str] = ("", "")) -> None:
    """Print two texts beside each other."""
    show(f"   {styled(f'{left:{COLUMN}}', styles[0])} {styled(right, styles[1])}".rstrip())


def show_wires(ours: Recording, stock: Recording) -> None:
    """Print what was sent with fictive_sqlalchemy, beside what was sent on stock."""
    for left, right in zip_longest(statements(ours), statements(stock), fillvalue=""):
        show_columns(left, right)
    show_columns(figures(ours), figures(stock), (GREEN, YELLOW))


def styled(line: str, style: str) -> str:
    """Return a line with the codes for its style, if standard output is a terminal."""
    if style and line and sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"\x1b[{style}m{line}\x1b[0m"
    return line


def statements(recording: Recording) -> Iterable[str]:
    """Return the statements of a recording, each in a few words."""
    lines: list[str] = []
    for message in recording.messages:
        if message.is_statement:
            lines.append(in_short(message))
        elif message.name == "ErrorResponse" and lines:
            lines[-1] += "   <- the database refuses it"
    return lines


def in_short(message: Message) -> str:
    """Return a statement in a few words: ``SELECT account FOR UPDATE``."""
    words = [message.verb]
    table = re.search(r'\b(?:FROM|INTO|UPDATE) "?(\w+)', message.text)
    if table:
        words.append(table[1])
    words += [part for part in ("FOR UPDATE", "ON CONFLICT DO NOTHING") if part in message.text]
    return " ".join(words)


def figures(recording: Recording) -> str:
    """Return the numbers of a recording as text."""
    trips = recording.round_trips
    idle = milliseconds(recording.idle_in_transaction)
    return f"{trips} round trip{'' if trips == 1 else 's'}, {idle} idle in a transaction"


def milliseconds(seconds: float) -> str:
    """Return a time as text, in milliseconds."""
    number = seconds * 1000
    return f"{number:.1f} ms" if 0 < number < 10 else f"{number:.0f} ms"
