"""The list of figures in which this package is behind a peer, with reasons written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from benchmarks import contention, cpu, growth, latency, memory, round_trips, waiting
from benchmarks.figures import Figure
from benchmarks.peers import DRIVER_TITLES, load_peer

#: The kinds of figures for which more is better. For all other kinds, less is better.
MORE = {waiting.SHARE, contention.RATIO}

#: The reasons, by the names of the peers.
Reasons: TypeAlias = dict[tuple[str, ...], str]

#: A figure counts if the spreads do not overlap and the figures differ by more than this factor.
LEAST = 1.05

_FLASK = ("stock", "lite")
_AUTOCOMMIT = ("autocommit",)
_SQLALCHEMY = (*_FLASK, *_AUTOCOMMIT)
_OTHER_ORMS = ("django", "peewee")
_BY_HAND = ("by_hand", "by_hand_alone")
_ALL = (*_SQLALCHEMY, *_OTHER_ORMS, *_BY_HAND)

_CPU: Reasons = {
    _SQLALCHEMY: (
        "A flush finds out whether the transaction is a single statement. If it is not, the "
        "connection leaves autocommit and returns to it. Before a transaction, the session checks "
        "that the server is still connected. After the transaction, the session calls the "
        "callbacks. After a statement outside a transaction, the session asks whether the pool "
        "needs the connection. `filter_by_or_create` checks its arguments."
    ),
    _OTHER_ORMS: (
        "SQLAlchemy's session keeps track of each object. Django and peewee have no such session. "
        "Flask's context is part of the request, too."
    ),
    _BY_HAND: "Without an ORM and without Flask, this is the lowest cost possible.",
}
_THREADS: Reasons = {
    _ALL: (
        "Python runs one thread of a process at a time, so the client's CPU time decides when "
        "there are many threads. If the pool has no spare connection, this package gives the "
        "connection back after each statement, which costs CPU time, too. A peer that has a "
        "connection for each thread never waits for one."
    ),
}

#: The kinds of figures that belong together, and the reasons for groups of peers.
KINDS: dict[str, tuple[tuple[str, ...], Reasons]] = {
    "Round trips": (
        (round_trips.ROUND_TRIPS,),
        {
            _SQLALCHEMY: (
                "In autocommit there is no BEGIN and no COMMIT, and nothing can be rolled back. "
                "This package sends both, unless the transaction is the single INSERT or UPDATE of "
                "a flush."
            ),
            _OTHER_ORMS: (
                "SQLAlchemy inserts many rows with several statements, and these peers with one."
            ),
            _BY_HAND: (
                "SQL that is written by hand needs no savepoint for an INSERT … ON CONFLICT, and "
                "its author knows that no statement follows. One COPY sends all rows."
            ),
        },
    ),
    "Client CPU": ((cpu.CPU,), _CPU),
    "Python calls": ((cpu.CALLS,), _CPU),
    "Client instructions": ((cpu.INSTRUCTIONS,), _CPU),
    "Memory": (
        (memory.HELD, memory.STREAMED),
        {
            _SQLALCHEMY: (
                "The objects are the same. For a stream outside a transaction, this package has a "
                "cursor class of its own."
            ),
            _OTHER_ORMS: ("SQLAlchemy's session keeps a state for each object of a portion."),
            _BY_HAND: "Without an ORM, a row is a tuple.",
        },
    ),
    "Latency": (
        (latency.LATENCY,),
        {
            _ALL: (
                "If the number of round trips is the same, or if there is no delay, the client's "
                "CPU time decides, as above."
            ),
        },
    ),
    "One hot row": (
        (contention.RATIO,),
        {
            _SQLALCHEMY: (
                "In autocommit an UPDATE is sent alone, too, so the client's CPU time decides."
            ),
            _BY_HAND: ("By hand, the UPDATE is sent alone, too, so the client's CPU time decides."),
        },
    ),
    "Requests that wait": ((waiting.SHARE, waiting.P99), _THREADS),
    "How the cost grows, at the largest size": (
        tuple(growth.SIZES),
        {
            _SQLALCHEMY: _CPU[_SQLALCHEMY],
            _OTHER_ORMS: (
                "The reasons are those for the client's CPU. In addition, a commit expires each "
                "object of the session, as with Flask-SQLAlchemy."
            ),
            _BY_HAND: "Without an ORM and without Flask, this is the lowest cost possible.",
        },
    ),
}


def text(figures: Sequence[Figure]) -> str:
    """Return the list for the page."""
    parts: list[str] = []
    for title, (kinds, reasons) in KINDS.items():
        lines = list(_lines([one for one in figures if one.kind in kinds], reasons))
        if lines:
            parts.append("\n".join([f"**{title}**", "", *lines]))
    return "\n\n".join(parts) or "This run found nothing."


def _lines(figures: Sequence[Figure], reasons: Reasons) -> Iterator[str]:
    largest = {kind: max(sizes) for kind, sizes in growth.SIZES.items()}
    own = [one for one in figures if one.at == largest.get(one.kind, one.at)]
    ours = {_key(one): one for one in own if one.peer == "ours"}
    for peers, reason in reasons.items():
        places: list[str] = []
        for peer in peers:
            compared = [(times(ours[_key(one)], one), one) for one in own if one.peer == peer]
            found = [(factor, one) for factor, one in compared if factor is not None]
            if found:
                most, where = max(found, key=lambda pair: pair[0])
                places.append(
                    f"{load_peer(peer).title} in {len(found)} of {len(compared)} figures, by up to "
                    f"{most:.2f} times ({_place(where)})"
                )
        if places:
            yield f"- {'; '.join(places)}. *Why:* {reason}"


def _key(figure: Figure) -> tuple[object, ...]:
    return figure.kind, figure.what, figure.driver, figure.at


def times(ours: Figure, other: Figure) -> float | None:
    """Return how many times worse our figure is; ``None`` if this package is not behind.

    :param ours: Our figure.
    :param other: The figure of a peer.
    """
    if ours.value is None or not other.value:
        return None
    worse, better = (other, ours) if ours.kind in MORE else (ours, other)
    factor = (worse.value or 0.0) / (better.value or 1.0)
    apart = worse.low is None or better.high is None or worse.low > better.high
    return factor if factor > LEAST and apart else None


def _place(figure: Figure) -> str:
    place = figure.what
    if figure.kind == latency.LATENCY:
        place += f" at {figure.at:.0f} ms"
    elif figure.kind in (waiting.SHARE, waiting.P99, contention.RATIO):
        place = f"{figure.kind} with {figure.at:.0f} threads"
    elif figure.kind in growth.SIZES:
        place += f": {figure.at:,.0f}"
    return f"{place}, {DRIVER_TITLES[figure.driver]}"
