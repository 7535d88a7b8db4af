"""Shows the moments: a table for the terminal, one for the docs, and a picture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from textwrap import fill
from xml.sax.saxutils import escape

from tests.cluster.load import CLIENTS
from tests.cluster.records import Answer, Change, Moment
from tests.cluster.stage import THREADS, WORKERS, Wanted

#: The width of one bar, in seconds.
BUCKET = 0.25

# How much of an error is shown, and of how many of them.
_WORDS, _KINDS_SHOWN, _LONGEST = 200, 12, 400

_PICTURE = "![Requests per second while PostgreSQL fails over](images/cluster.svg)"

_WIDTH, _LEFT, _RIGHT = 440, 44, 14
_TOP, _BARS, _BAND = 50, 84, 20
_PANEL = _TOP + _BARS + _BAND + 38
_HEAD = 74

# Each is dark enough for white letters on it, and for itself on white.
_COLORS: tuple[str, ...] = ("#1d4ed8", "#7e22ce", "#9a3412")
_GOOD, _BAD, _INK, _GRAY = "#0d9488", "#dc2626", "#0f172a", "#475569"


def errors(moment: Moment) -> Counter[str]:
    """Return how often each error was the answer, by its class and its first words."""
    return Counter(_words(answer) for answer in moment.answers if not answer.ok)


def _words(answer: Answer) -> str:
    said = re.sub(r"^\(\w+\.\w+\) ", "", " ".join(answer.text.split()))
    # Ports, numbers of processes and names of cursors would make each of them another one.
    return f"{answer.error}: {re.sub(r'[0-9]+', '#', said)[:_WORDS]}"


def lines(moment: Moment) -> Iterator[str]:
    """Return what the terminal shows of a moment."""
    answers = moment.answers
    seconds = moment.ended - moment.began
    good = sum(answer.ok for answer in answers)
    transfers = sum(answer.outcome == "stored" for answer in answers if answer.writes)
    reads = sum(answer.ok for answer in answers if not answer.writes)
    unknown = sum(answer.outcome == "unknown" for answer in answers if answer.writes)
    yield f"{moment.name}: {moment.done}"
    yield (
        f"  {good / seconds:.0f} requests/s answered well: {transfers} transfers, {reads} reads;"
        f" {len(answers) - good} errors, {unknown} unknown"
    )
    if moment.model:
        yield f"  before it: {moment.model}"
    for words, count in errors(moment).most_common(_KINDS_SHOWN):
        yield f"    {count:4} {words}"
    yield f"  primary {moment.before} -> {moment.after}{_times(moment)}"
    yield f"  longest time without a transfer {moment.longest_gap:.2f} s"
    if moment.cuts:
        yield f"  {moment.cuts} connections cut in the middle of COMMIT"
    if moment.lost:
        yield f"  {moment.lost} transfers lost"
    yield from (f"    {line}" for line in moment.reported)
    yield from (f"  FAILED: {' '.join(failure.split())[:_LONGEST]}" for failure in moment.failures)


def _times(moment: Moment) -> str:
    if moment.took_writes is None:
        return ""
    said = f", which took writes after {moment.took_writes - moment.at:.2f} s"
    if moment.first_stored is not None:
        said += f"; first transfer {moment.first_stored - moment.took_writes:.2f} s later"
    return said


def timeline(moment: Moment) -> Iterator[str]:
    """Return what happened in each quarter of a second in which something did."""
    for number, (good, bad) in enumerate(_buckets(moment)):
        start = moment.began + number * BUCKET
        notes = [
            f"{change.node} is {change.state}"
            for change in moment.changes
            if start <= change.at < start + BUCKET
        ]
        whole = start + BUCKET <= moment.ended
        if bad or notes or (whole and not good):
            said = ", ".join(notes)
            yield f"    {start - moment.at:+6.2f} s {good:4} ok {bad:4} errors  {said}".rstrip()


def table(moments: Sequence[Moment]) -> str:
    """Return the table for the docs, in Markdown, which a phone can show."""
    rows = [
        "| moment | errors (unknown) | new primary | first write | transfers lost |",
        "|---|---|---|---|---|",
    ]
    for moment in moments:
        answers = moment.answers
        unknown = sum(answer.outcome == "unknown" for answer in answers if answer.writes)
        took, first = moment.took_writes, moment.first_stored
        cells = [
            moment.name,
            f"{sum(not answer.ok for answer in answers)} ({unknown})",
            "-" if took is None else f"{took - moment.at:.1f} s",
            "-" if took is None or first is None else f"+{first - took:.2f} s",
            str(moment.lost),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def circumstances(wanted: Wanted) -> str:
    """Return the sentence that the docs have beneath the table."""
    through = "several hosts in the URL" if wanted.through == "hosts" else "PgBouncer and HAProxy"
    standby = "without a" if wanted.asynchronous else "with a"
    return (
        f"Measured on {date.today():%d %B %Y} with {wanted.driver} and {through}, {standby} "
        f"synchronous standby: gunicorn with {WORKERS} workers of {THREADS} threads, and "
        f"{CLIENTS} clients, which send one request after the other and try again at once. *New "
        "primary* is the time from the moment until another server accepts writes. *First write* "
        "is the time from then until the first transfer is answered."
    )


def write(moments: Sequence[Moment], docs: Path, nodes: Sequence[str], wanted: Wanted) -> None:
    """Write the table to the page, between the marks, and the picture that stands above it.

    A run without a synchronous standby has marks of its own, and no picture.

    :param moments: The moments.
    :param docs: The directory of the docs.
    :param nodes: The names of the servers.
    :param wanted: What the command line has asked for.
    """
    name = "cluster without a synchronous standby" if wanted.asynchronous else "cluster"
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    parts = [table(moments), circumstances(wanted)]
    if not wanted.asynchronous:
        (docs / "images" / "cluster.svg").write_text(svg(moments, nodes))
        parts.insert(0, _PICTURE)
    if moments and moments[0].model:
        parts.append(f"In the seconds before the first moment, {moments[0].model}.")
    page = docs / "more-than-one-server.md"
    before, found, rest = page.read_text().partition(begin)
    if found:
        after = rest.partition(end)[2]
        filled = [part if part.startswith(("|", "!")) else fill(part, 120) for part in parts]
        page.write_text(before + "\n\n".join([begin, *filled, end]) + after)


def svg(moments: Sequence[Moment], nodes: Sequence[str]) -> str:
    """Return the picture: a panel for each moment.

    :param moments: The moments.
    :param nodes: The names of the servers.
    """
    height = _HEAD + _PANEL * len(moments)
    colors = dict(zip(nodes, _COLORS, strict=False))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" role="img">',
        "  <title>Requests per second while PostgreSQL fails over</title>",
        f'  <rect width="{_WIDTH}" height="{height}" rx="10" fill="#f8fafc"/>',
        _text(20, 30, "Requests per second", 18, weight=700),
        *_legend(),
    ]
    most = max((max(map(sum, _buckets(moment)), default=0) for moment in moments), default=0)
    for number, moment in enumerate(moments):
        parts += _panel(moment, _HEAD + number * _PANEL, max(most, 1), colors)
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> Iterator[str]:
    x = 20
    for color, words, width in (
        (_GOOD, "answered", 96),
        (_BAD, "error", 70),
        ("none", "band: the primary", 0),
    ):
        if color != "none":
            yield f'  <rect x="{x}" y="45" width="13" height="13" rx="2" fill="{color}"/>'
            x += 19
        yield _text(x, 57, words, 15, color=_GRAY)
        x += width


def _panel(moment: Moment, top: int, most: int, colors: dict[str, str]) -> Iterator[str]:
    width = _WIDTH - _LEFT - _RIGHT
    seconds = max(moment.ended - moment.began, BUCKET)
    floor = top + _TOP + _BARS

    def x(time: float) -> float:
        return _LEFT + min(max((time - moment.began) / seconds, 0.0), 1.0) * width

    yield _text(20, top + 26, moment.name, 16, weight=700)
    yield f'  <rect x="{_LEFT}" y="{top + _TOP}" width="{width}" height="{_BARS}" fill="#ffffff"/>'
    bar = BUCKET / seconds * width
    for number, (good, bad) in enumerate(_buckets(moment)):
        left = _LEFT + number * bar
        wide = min(bar, _WIDTH - _RIGHT - left)
        base = float(floor)
        for count, color in ((good, _GOOD), (bad, _BAD)):
            if count:
                # A single error among many answers must not be too thin to see.
                high = max(count / most * _BARS, 2.0)
                base -= high
                yield (
                    f'  <rect x="{left:.1f}" y="{base:.1f}" width="{wide:.1f}" '
                    f'height="{high:.1f}" fill="{color}"/>'
                )
    for label, y in ((f"{most / BUCKET:.0f}", top + _TOP + 12), ("0", floor)):
        yield _text(_LEFT - 5, y, label, 13, color=_GRAY, anchor="end")
    for node, start, end in _reigns(moment):
        left, right = x(start), x(end)
        yield (
            f'  <rect x="{left:.1f}" y="{floor + 3}" width="{right - left:.1f}" '
            f'height="{_BAND}" fill="{colors.get(node, _GRAY)}"/>'
        )
        if right - left > 8 * len(node) + 8:
            yield _text((left + right) / 2, floor + 18, node, 14, "#ffffff", anchor="middle")
    yield (
        f'  <path d="M{x(moment.at):.1f} {top + _TOP - 8}V{floor + _BAND + 3}" '
        f'stroke="{_INK}" stroke-width="2"/>'
    )
    yield _text(x(moment.at) + 5, top + _TOP - 3, _said(moment), 13, color=_INK)
    step = 2 if seconds < 20 else 5
    for second in range(0, int(moment.ended - moment.at) + 1, step):
        yield _text(
            x(moment.at + second), floor + _BAND + 18, f"{second} s", 13, _GRAY, anchor="middle"
        )


def _said(moment: Moment) -> str:
    if moment.took_writes is not None:
        return f"a new primary after {moment.took_writes - moment.at:.1f} s"
    return moment.done


def _text(
    x: float,
    y: float,
    words: str,
    size: int,
    color: str = _INK,
    *,
    weight: int = 400,
    anchor: str = "start",
) -> str:
    return (
        f'  <text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{color}">{escape(words)}</text>'
    )


def _buckets(moment: Moment) -> list[tuple[int, int]]:
    """How many answers were good, and how many were errors, in each bucket."""
    count = int((moment.ended - moment.began) / BUCKET) + 1
    good, bad = [0] * count, [0] * count
    for answer in moment.answers:
        number = min(int((answer.ended - moment.began) / BUCKET), count - 1)
        (good if answer.ok else bad)[number] += 1
    return list(zip(good, bad, strict=True))


def _reigns(moment: Moment) -> Iterator[tuple[str, float, float]]:
    """Which server was primary in a moment, from when to when."""
    since: dict[str, Change] = {}
    for change in moment.changes:
        begun = since.pop(change.node, None)
        if begun is not None and change.at > moment.began:
            yield change.node, begun.at, change.at
        if change.state == "primary":
            since[change.node] = change
    for node, change in since.items():
        yield node, change.at, moment.ended
