"""A panel for Flask-DebugToolbar: what a request sends, and when its transactions wait.

Name the panel in the setting of the toolbar::

    app.config["DEBUG_TB_PANELS"] = ["fictive_sqlalchemy.ext.debugtoolbar.TransactionsPanel"]
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from .._core.engine import OptInEngine
from .._core.places import Place
from .._core.recorder import leave_context, of_this_context, recorder
from .._core.records import Statement, Transaction
from .._extras import FLASK, installed_by
from ..recording import Recording, counted, dialects_of, milliseconds

with installed_by(FLASK):
    from flask import Flask, current_app, g
with installed_by("flask-debugtoolbar"):
    from flask_debugtoolbar.panels import DebugPanel

_TEMPLATE = """
<style>
  #flDebug .fsa-line { position: relative; height: 14px; background: #eee; }
  #flDebug .fsa-line span { position: absolute; top: 0; height: 14px; min-width: 2px; }
  #flDebug .fsa-key { margin: 4px 0 8px; }
  #flDebug .fsa-key span { display: inline-block; width: 12px; height: 12px; margin: 0 4px 0 12px; }
  #flDebug span.fsa-outside { background: #7fb069; }
  #flDebug span.fsa-busy { background: #3a7bd5; }
  #flDebug span.fsa-waiting { background: #f0a030; }
  #flDebug span.fsa-failed { background: #c0392b; }
  #flDebug .fsa-sent { table-layout: fixed; width: 100%; }
  #flDebug .fsa-sent td { vertical-align: top; overflow-wrap: anywhere; }
  #flDebug .fsa-sent code { white-space: normal; }
  #flDebug .fsa-sent code.fsa-inside { display: block; padding-left: 2em; }
</style>
<p>{{ summary }}</p>
<p class="fsa-key">
  <span class="fsa-outside"></span>outside a transaction
  <span class="fsa-busy"></span>in a transaction
  <span class="fsa-waiting"></span>the transaction is open, and the database is not busy for it
  <span class="fsa-failed"></span>an error
</p>
<table class="fsa-sent">
  <thead><tr>
    <th>sent</th><th style="width: 33%">time line of {{ total }}</th>
    <th style="width: 5em">time</th><th style="width: 3em">rows</th><th style="width: 20%">by</th>
  </tr></thead>
  <tbody>
  {% for row in rows %}
    <tr class="fsa-row">
      <td><code{% if row.inside %} class="fsa-inside"{% endif %}>{{ row.sql }}</code></td>
      <td><div class="fsa-line">
        {%- for bar in row.bars -%}
        <span class="fsa-{{ bar.kind }}" title="{{ bar.title }}"
              style="left: {{ bar.left }}%; width: {{ bar.width }}%"></span>
        {%- endfor -%}
      </div></td>
      <td>{{ row.time }}</td><td>{{ row.rows }}</td>
      <td title="{{ row.place }}">{{ row.by }}</td>
    </tr>
  {% endfor %}
  </tbody>
</table>
"""


def _short(place: Place) -> str:
    return f"{place.call}() in {place.function}, {Path(place.filename).name}:{place.line}"


def _end(error: BaseException | None = None) -> None:
    recording = g.pop("fictive_sqlalchemy_panel", None)
    if recording is not None:
        leave_context(recording)
        recorder.leave(recording)


class TransactionsPanel(DebugPanel):
    """Shows the statements of a request, BEGIN and COMMIT included, on a time line.

    Each statement has its place in the code. What is sent at the end of the request, such as the
    COMMIT of a request that is one transaction, is not in the panel, which is made before.
    """

    name = "Transactions"
    has_content = True

    @classmethod
    def init_app(cls, app: Flask) -> None:
        """Stop the recording at the end of each request, even after an error."""
        app.teardown_request(_end)

    def process_request(self, request: Any) -> None:
        """Start recording."""
        extension = current_app.extensions.get("sqlalchemy")
        engines = () if extension is None else extension.engines.values()
        dialects = dialects_of(each for each in engines if isinstance(each, OptInEngine))
        self._started = self._ended = perf_counter()
        self._recording = Recording(dialects)
        g.fictive_sqlalchemy_panel = self._recording
        recorder.use(self._recording, dialects)
        of_this_context.set((*of_this_context.get(), self._recording))

    def process_response(self, request: Any, response: Any) -> None:
        """Stop recording."""
        self._ended = perf_counter()
        _end()

    def nav_title(self) -> str:
        """Return the title in the toolbar."""
        return "Transactions"

    def nav_subtitle(self) -> str:
        """Return the numbers, for the toolbar."""
        recording = self._recording
        return (
            f"{counted(recording.round_trips, 'round trip')}, "
            f"{counted(recording.transaction_count, 'transaction')}, "
            f"{milliseconds(recording.waiting)} waiting"
        )

    def title(self) -> str:
        """Return the title of the panel."""
        return "What this request has sent"

    def url(self) -> str:
        """Return no URL: the content is in the page."""
        return ""

    def content(self) -> str:
        """Return the panel, as HTML."""
        rows = [self._row(statement) for statement in self._recording.sent]
        template = self.jinja_env.from_string(_TEMPLATE)
        return template.render(
            summary=self._recording.summary(),
            rows=rows,
            total=milliseconds(self._ended - self._started),
        )

    def _row(self, statement: Statement) -> dict[str, Any]:
        transaction, place = statement.transaction, statement.place
        kind = "outside" if transaction is None else "busy"
        if statement.error is not None:
            kind = "failed"
        bars: list[dict[str, Any]] = []
        if transaction is not None and transaction.started is not None:
            bars.append(self._waiting(transaction, statement))
        bars.append(self._bar(kind, statement.started, statement.duration))
        return {
            "sql": " ".join(statement.sql.split()),
            "inside": transaction is not None and not statement.is_control,
            "bars": [bar for bar in bars if bar],
            "time": milliseconds(statement.duration),
            "rows": "" if statement.rows is None else statement.rows,
            "place": "" if place is None else str(place),
            "by": "" if place is None else _short(place),
        }

    def _waiting(self, transaction: Transaction, statement: Statement) -> dict[str, Any]:
        """Return the bar for the time since the previous statement of the transaction."""
        before = transaction.started or 0.0
        for each in transaction.sent:
            if each is statement:
                break
            before = max(before, each.started + each.duration)
        return self._bar("waiting", before, statement.started - before)

    def _bar(self, kind: str, started: float, duration: float) -> dict[str, Any]:
        total = max(self._ended - self._started, 1e-9)
        if duration <= 0 and kind == "waiting":
            return {}
        return {
            "kind": kind,
            "left": f"{max(0.0, (started - self._started) / total * 100):.2f}",
            "width": f"{duration / total * 100:.2f}",
            "title": f"{kind}: {milliseconds(duration)}",
        }
