"""Where this package is behind a peer, found in the figures, and why, which is for us to know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from benchmarks import contention, cpu, growth, latency, memory, round_trips, waiting
from benchmarks.figures import Figure
from benchmarks.peers import DRIVER_TITLES, load_peer

#: Where more is better. Everywhere else less is.
MORE = {waiting.SHARE, contention.RATIO}

#: Why, by the names of the peers.
Reasons: TypeAlias = dict[tuple[str, ...], str]

#: A figure counts when the spreads do not overlap and it differs by more than this.
LEAST = 1.05

_FLASK = ("stock", "lite")
_AUTOCOMMIT = ("autocommit",)
_SQLALCHEMY = (*_FLASK, *_AUTOCOMMIT)
_OTHER_ORMS = ("django", "peewee")
_BY_HAND = ("by_hand", "by_hand_alone")
_ALL = (*_SQLALCHEMY, *_OTHER_ORMS, *_BY_HAND)

_CPU: Reasons = {
    _SQLALCHEMY: (
        "a flush finds out whether one statement is all of the transaction; if it is not, the "
        "transaction takes a connection out of autocommit and back; before it the session checks "
        "that the server is still there, and after it calls the callbacks; a statement outside "
        "asks whether the pool needs the connection, and `filter_by_or_create` checks what it is "
        "called with"
    ),
    _OTHER_ORMS: (
        "SQLAlchemy's session keeps track of each object, which theirs do not have, and Flask's "
        "context is part of the request"
    ),
    _BY_HAND: "there is no ORM and no Flask: this is the floor",
}
_THREADS: Reasons = {
    _ALL: (
        "Python runs one thread of a process at a time, so what counts with many threads is the "
        "client's CPU; where the pool has no spare connection, giving it back after each "
        "statement costs some, too. Who has a connection for each thread need not wait for one"
    ),
}

#: Figures that belong together, and the reasons, for some peers each.
KINDS: dict[str, tuple[tuple[str, ...], Reasons]] = {
    "Round trips": (
        (round_trips.ROUND_TRIPS,),
        {
            _SQLALCHEMY: (
                "in autocommit there is no BEGIN and no COMMIT, and so nothing to undo; here there "
                "are both, unless the transaction is the one INSERT or UPDATE of a flush"
            ),
            _OTHER_ORMS: "SQLAlchemy inserts with several statements what they insert with one",
            _BY_HAND: (
                "who writes by hand knows that a statement is the only one, and that an INSERT "
                "gives way without a savepoint; a COPY brings all rows at once"
            ),
        },
    ),
    "Client CPU": ((cpu.CPU,), _CPU),
    "Python calls": ((cpu.CALLS,), _CPU),
    "Client instructions": ((cpu.INSTRUCTIONS,), _CPU),
    "Memory": (
        (memory.HELD, memory.STREAMED),
        {
            _SQLALCHEMY: "the objects are the same; a stream outside has a cursor of our own",
            _OTHER_ORMS: "a session keeps a state for each object, and the portion is of those",
            _BY_HAND: "a row is a tuple",
        },
    ),
    "Latency": (
        (latency.LATENCY,),
        {
            _ALL: (
                "with as many round trips, or without a delay, what counts is the client's CPU, as "
                "above"
            ),
        },
    ),
    "One hot row": (
        (contention.RATIO,),
        {
            _SQLALCHEMY: "in autocommit an UPDATE is sent alone, too; what counts is the CPU",
            _BY_HAND: "the UPDATE alone, without an ORM: what counts is the client's CPU",
        },
    ),
    "Requests that wait": ((waiting.SHARE, waiting.P99), _THREADS),
    "How the cost grows, at the largest size": (
        tuple(growth.SIZES),
        {
            _SQLALCHEMY: _CPU[_SQLALCHEMY],
            _OTHER_ORMS: (
                "as for the client's CPU; and a commit expires each object that the session has, "
                "as it does on Flask-SQLAlchemy"
            ),
            _BY_HAND: "there is no ORM and no Flask: this is the floor",
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
            yield f"- {'; '.join(places)}. *Why:* {reason}."


def _key(figure: Figure) -> tuple[object, ...]:
    return figure.kind, figure.what, figure.driver, figure.at


def times(ours: Figure, other: Figure) -> float | None:
    """Return how many times worse ours is; nothing where we are not behind.

    :param ours: Our figure.
    :param other: A peer's.
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
