"""Sentry's integrations of SQLAlchemy and Flask: what they would send agrees with the wire."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.wire import WireProxy

ROOT = Path(__file__).parents[2]
SITE = "tests.neighbours.sentry_site"


class Request(NamedTuple):
    """What Sentry sends for a request."""

    payloads: list[dict[str, Any]]

    @property
    def errors(self) -> list[dict[str, Any]]:
        return [payload for payload in self.payloads if "exception" in payload]

    @property
    def spans(self) -> list[dict[str, Any]]:
        return [span for payload in self.payloads for span in payload.get("spans", ())]

    @property
    def verbs(self) -> list[str]:
        """The first word of each span's description, in the order in which they began."""
        spans = sorted(self.spans, key=lambda span: str(span["start_timestamp"]))
        return [first_word(span["description"]) for span in spans]


def first_word(text: str) -> str:
    return text.split()[0]


@pytest.fixture
def requests(wire: WireProxy, wire_url: str) -> list[Request]:
    """A read, a transaction, one that fails, and a read again."""
    with wire.record() as recording:
        done = subprocess.run(
            [sys.executable, "-m", SITE, wire_url, "/", "/Grace", "/Bob", "/"],
            cwd=ROOT,
            capture_output=True,
            check=False,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    # What the application sends before comes from another connection, or ends with its COMMIT.
    assert recording.verbs[-10:] == [
        *["SELECT"],
        *["SELECT", "BEGIN", "UPDATE", "COMMIT"],
        *["SELECT", "BEGIN", "UPDATE", "ROLLBACK"],
        *["SELECT"],
    ]
    return [Request(payloads) for payloads in json.loads(done.stdout)]


def test_sentrys_spans_are_the_statements(requests: list[Request]) -> None:
    read, write, failed, read_again = requests
    assert read.verbs == read_again.verbs == ["SELECT"]
    # The second is the application's own, around the transaction.
    assert write.verbs == failed.verbs == ["SELECT", "rename", "UPDATE"]
    for request in write, failed:
        parents = {first_word(span["description"]): span for span in request.spans}
        assert parents["UPDATE"]["parent_span_id"] == parents["rename"]["span_id"]
        assert parents["SELECT"]["parent_span_id"] != parents["rename"]["span_id"]

    assert not any(request.errors for request in (read, write, read_again))
    [error] = failed.errors
    assert error["exception"]["values"][-1]["type"] == "IntegrityError"
    breadcrumbs = [each["message"] for each in error["breadcrumbs"]["values"]]
    assert [first_word(each) for each in breadcrumbs] == ["SELECT", "UPDATE"]
    status = {first_word(span["description"]): span.get("status") for span in failed.spans}
    assert status == {"SELECT": None, "rename": "internal_error", "UPDATE": "internal_error"}
