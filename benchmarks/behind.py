"""Where this package is behind a peer, found in the figures, and why, which is for us to know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks import cpu, growth, latency, memory, round_trips, waiting
from benchmarks.figures import Figure
from benchmarks.peers import DRIVER_TITLES, load_peer

#: Where more is better. Everywhere else less is.
MORE = {waiting.SHARE}

#: A figure counts when the spreads do not overlap and it differs by more than this.
LEAST = 1.05

_ORM = "SQLAlchemy's ORM does more for each object and statement, and Flask for each request."
_CPU = {
    ("stock", "lite"): (
        "A transaction leaves autocommit and comes back; the session looks whether the server is "
        "still there and whether the transaction was aborted, and after each statement whether "
        "the pool needs its connection."
    ),
    ("autocommit",): "The same as beside Flask-SQLAlchemy; its commits send and undo nothing.",
    ("django", "peewee"): _ORM,
    ("by_hand",): "There is no ORM and no Flask: this is the floor.",
}

#: By the kind of figure, for some peers each.
WHY: dict[str, dict[tuple[str, ...], str]] = {
    round_trips.ROUND_TRIPS: {
        ("stock", "lite"): "None is known.",
        ("autocommit",): "It has no BEGIN and no COMMIT, so what fails half-way stays half done.",
        ("django", "peewee"): (
            "SQLAlchemy inserts 1,000 rows with a statement on psycopg2, these all with one."
        ),
        ("by_hand",): "By hand it is one COPY, which needs no transaction.",
    },
    cpu.CALLS: _CPU,
    cpu.CPU: _CPU,
    cpu.INSTRUCTIONS: _CPU,
    memory.HELD: {
        ("stock", "lite", "autocommit"): "The objects are the same; what differs is between runs.",
        ("django", "peewee"): (
            "A session keeps a state for each object, a reference to it, and what was loaded."
        ),
        ("by_hand",): "A row is a tuple.",
    },
    memory.STREAMED: {
        ("stock", "lite"): "A cursor WITH HOLD keeps nothing in the client; the rest is ours.",
        ("django", "peewee", "by_hand"): "A portion of objects is larger, as above.",
    },
    latency.LATENCY: {
        ("stock", "lite"): "The client's CPU, while nothing else takes time.",
        ("autocommit",): "It has fewer round trips, for it is not atomic.",
        ("django", "peewee"): "The client's CPU, while nothing else takes time.",
        ("by_hand",): "The client's CPU, while nothing else takes time.",
    },
    waiting.SHARE: {
        ("stock", "lite", "autocommit"): "The client's CPU: Python runs one thread at a time.",
        ("django", "peewee", "by_hand"): "The client's CPU: Python runs one thread at a time.",
    },
    waiting.P99: {
        ("stock", "lite", "autocommit"): "The client's CPU: Python runs one thread at a time.",
        ("django", "peewee", "by_hand"): "The client's CPU: Python runs one thread at a time.",
    },
    growth.READS: _CPU,
    growth.ROWS: _CPU,
    growth.READ_AMONG: _CPU,
    growth.UPDATE_AMONG: _CPU,
}


def text(figures: Sequence[Figure]) -> str:
    """Return the list for the page."""
    return "\n".join(_lines(figures)) or "This run found nothing."


def _lines(figures: Sequence[Figure]) -> Iterator[str]:
    largest = {kind: max(sizes) for kind, sizes in growth.SIZES.items()}
    looked_at = [one for one in figures if one.at == largest.get(one.kind, one.at)]
    for kind, reasons in WHY.items():
        own = [one for one in looked_at if one.kind == kind]
        ours = {(one.driver, one.what, one.at): one for one in own if one.peer == "ours"}
        for peers, why in reasons.items():
            found: dict[tuple[str, str], list[str]] = {}
            for one in own:
                times = _times(ours[one.driver, one.what, one.at], one)
                if one.peer in peers and times is not None:
                    found.setdefault((one.peer, one.driver), []).append(_place(one, times))
            if found:
                yield f"- **{kind[0].upper()}{kind[1:]}.** {why}"
            for (peer, driver), places in found.items():
                yield f"  - {load_peer(peer).title}, {DRIVER_TITLES[driver]}: {', '.join(places)}"


def _times(ours: Figure, other: Figure) -> float | None:
    """Return how many times as much we need; nothing where we are not behind."""
    if ours.value is None or not other.value:
        return None
    worse, better = (other, ours) if ours.kind in MORE else (ours, other)
    times = (worse.value or 0.0) / (better.value or 1.0)
    apart = worse.low is None or better.high is None or worse.low > better.high
    return times if times > LEAST and apart else None


def _place(figure: Figure, times: float) -> str:
    at = ""
    if figure.kind == latency.LATENCY:
        at = f" at {figure.at:.0f} ms"
    elif figure.kind in (waiting.SHARE, waiting.P99):
        at = f" with {figure.at:.0f} threads"
    elif figure.kind in growth.SIZES:
        at = f" at {figure.at:,.0f}"
    what = "" if figure.kind in (waiting.SHARE, waiting.P99, figure.what) else figure.what
    return f"{what}{at} {times:.2f}".strip()
