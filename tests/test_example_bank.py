"""The bank of ``examples/bank``: what it answers, what it sends, and the demo from start to end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import NullPool, create_engine, text

from examples.bank import app as bank
from examples.bank.database import db
from examples.bank.models import Account, Transfer, create_tables
from tests.wire import Recording, WireProxy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

ADA, GRACE, PIGGY_BANK = 1, 2, 3


@pytest.fixture
def app(wire_url: str) -> Iterator[Flask]:
    app = bank.create_app(wire_url)
    app.config["RATE_SECONDS"] = 0
    with app.app_context():
        create_tables()
    yield app
    with app.app_context():
        db.engine.dispose()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """A client; the app's connection is open and what is sent first on it is sent."""
    client = app.test_client()
    assert client.get("/accounts").status_code == 200
    return client


def balances(client: FlaskClient) -> dict[str, str]:
    return {account["owner"]: account["balance"] for account in client.get("/accounts").json or ()}


def move(client: FlaskClient, source: object, target: object, amount: object) -> tuple[int, Any]:
    values = {"source_id": source, "target_id": target, "amount": amount}
    response = client.post("/transfers", json=values)
    return response.status_code, response.json


# -- what it answers -------------------------------------------------------------------------------


def test_the_bank_lists_accounts(client: FlaskClient) -> None:
    response = client.get("/accounts")
    assert response.status_code == 200
    assert response.json == [
        {"id": ADA, "owner": "Ada", "balance": "1000.00"},
        {"id": GRACE, "owner": "Grace", "balance": "500.00"},
        {"id": PIGGY_BANK, "owner": "Piggy bank", "balance": "80.00"},
    ]


def test_the_bank_reads_an_account(client: FlaskClient) -> None:
    response = client.get("/accounts/2")
    assert (response.status_code, response.json) == (
        200,
        {"id": GRACE, "owner": "Grace", "balance": "500.00"},
    )


@pytest.mark.parametrize(
    "path", ["/accounts/99", "/accounts/99/overview", f"/accounts/{2**31}", "/accounts/x", "/x"]
)
def test_the_bank_answers_404_in_json(client: FlaskClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.json is not None
    assert response.json["error"]


def test_the_bank_says_which_methods_there_are(client: FlaskClient) -> None:
    response = client.delete("/accounts")
    assert response.status_code == 405
    assert "POST" in response.headers["Allow"]


def test_an_overview_has_the_worth_and_the_transfers(client: FlaskClient) -> None:
    move(client, ADA, GRACE, "10.10")
    move(client, GRACE, PIGGY_BANK, 1)
    overview = client.get("/accounts/1/overview?currency=CHF").json
    assert overview is not None
    assert overview["account"] == {"id": ADA, "owner": "Ada", "balance": "989.90"}
    assert overview["worth"] == "791.92"
    assert [transfer["amount"] for transfer in overview["transfers"]] == ["10.10"]


def test_an_unknown_currency_is_refused(client: FlaskClient) -> None:
    response = client.get("/accounts/1/overview?currency=XXX")
    assert response.status_code == 400
    assert "EUR" in response.text


def test_the_bank_opens_an_account_once(client: FlaskClient) -> None:
    values = {"owner": " Hopper ", "balance": 20}
    first = client.post("/accounts", json=values)
    assert (first.status_code, first.json) == (
        201,
        {"id": 4, "owner": "Hopper", "balance": "20.00"},
    )
    second = client.post("/accounts", json={**values, "balance": 5})
    assert (second.status_code, second.json) == (200, first.json)


def test_many_requests_open_an_account_once(app: Flask) -> None:
    def open_it(_: int) -> tuple[int, Any]:
        response = app.test_client().post("/accounts", json={"owner": "Hopper", "balance": 20})
        return response.status_code, response.json

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(open_it, range(8)))
    assert sorted(status for status, _ in answers) == [200] * 7 + [201]
    assert len({account["id"] for _, account in answers}) == 1


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"owner": "Hopper"},
        {"owner": "", "balance": 1},
        {"owner": "   ", "balance": 1},
        {"owner": "x" * 81, "balance": 1},
        {"owner": "a\0b", "balance": 1},
        {"owner": ["Hopper"], "balance": 1},
        {"owner": "Hopper", "balance": -1},
        {"owner": "Hopper", "balance": "0.001"},
        {"owner": "Hopper", "balance": "NaN"},
        {"owner": "Hopper", "balance": "Infinity"},
        {"owner": "Hopper", "balance": "1e1000"},
        {"owner": "Hopper", "balance": True},
        {"owner": "Hopper", "balance": [1]},
        ["Hopper", 1],
    ],
)
def test_an_account_that_makes_no_sense_is_refused(client: FlaskClient, values: object) -> None:
    assert client.post("/accounts", json=values).status_code == 400
    assert len(balances(client)) == 3


@pytest.mark.parametrize("path", ["/accounts", "/transfers"])
def test_what_is_not_json_is_refused(client: FlaskClient, path: str) -> None:
    assert client.post(path, data="{", content_type="application/json").status_code == 400
    assert client.post(path, data={"owner": "Hopper"}).status_code == 400


def test_more_money_than_an_account_may_hold_is_refused(client: FlaskClient) -> None:
    response = client.post("/accounts", json={"owner": "Croesus", "balance": 10**9})
    assert response.status_code == 409
    assert "Croesus" not in balances(client)


def test_the_bank_transfers_money(client: FlaskClient) -> None:
    status, transfer = move(client, ADA, GRACE, "99.95")
    assert status == 201
    assert transfer.pop("at")
    assert transfer == {"id": 1, "source_id": ADA, "target_id": GRACE, "amount": "99.95"}
    assert balances(client) == {"Ada": "900.05", "Grace": "599.95", "Piggy bank": "80.00"}


@pytest.mark.parametrize(
    ("source", "target", "amount", "status"),
    [
        (ADA, 99, 1, 404),
        (99, ADA, 1, 404),
        (ADA, ADA, 1, 400),
        (ADA, None, 1, 400),
        (ADA, "two", 1, 400),
        (ADA, 2**31, 1, 400),
        (ADA, "9" * 5000, 1, 400),
        (ADA, -2, 1, 400),
        (ADA, True, 1, 400),
        (ADA, GRACE, 0, 400),
        (ADA, GRACE, -1, 400),
        (ADA, GRACE, "0.001", 400),
        (ADA, GRACE, "ten", 400),
        (ADA, GRACE, None, 400),
        (ADA, GRACE, 10**10, 400),
        (ADA, GRACE, "1000.01", 409),
        (GRACE, ADA, 10**9, 409),
        (ADA, PIGGY_BANK, "20.01", 409),
    ],
)
def test_a_transfer_that_cannot_be_changes_nothing(
    client: FlaskClient, source: object, target: object, amount: object, status: int
) -> None:
    before = balances(client)
    found, answer = move(client, source, target, amount)
    assert found == status
    assert answer["error"]
    assert balances(client) == before
    assert move(client, ADA, GRACE, 1)[0] == 201


def test_the_bank_says_which_rule_a_transfer_breaks(client: FlaskClient) -> None:
    assert "not enough money" in move(client, ADA, GRACE, "1000.01")[1]["error"]
    assert "hold" in move(client, ADA, PIGGY_BANK, "20.01")[1]["error"]


def test_transfers_in_both_directions_neither_deadlock_nor_lose_money(app: Flask) -> None:
    def both(number: int) -> int:
        source, target = (ADA, GRACE) if number % 2 else (GRACE, ADA)
        return move(app.test_client(), source, target, "1.01")[0]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(both, range(40))) == [201] * 40
    assert balances(app.test_client()) == {
        "Ada": "1000.00",
        "Grace": "500.00",
        "Piggy bank": "80.00",
    }
    with app.app_context():
        assert Transfer.query.count() == 40


def test_the_page_shows_accounts_and_transfers_escaped(client: FlaskClient) -> None:
    client.post("/accounts", json={"owner": "<b>Bob</b>", "balance": "1234.5"})
    move(client, 4, GRACE, "0.5")
    response = client.get("/")
    assert response.status_code == 200
    assert response.mimetype == "text/html"
    assert "&lt;b&gt;Bob&lt;/b&gt;" in response.text
    assert "<b>Bob" not in response.text
    assert "1,234.00" in response.text
    assert 'name="viewport"' in response.text


def test_the_form_transfers_and_goes_back_to_the_page(client: FlaskClient) -> None:
    values = {"source_id": ADA, "target_id": GRACE, "amount": "250"}
    response = client.post("/", data=values)
    assert (response.status_code, response.location) == (303, "/")
    assert balances(client)["Ada"] == "750.00"


@pytest.mark.parametrize(
    ("target", "amount", "status"), [(PIGGY_BANK, "50", 409), (99, "1", 404), (GRACE, '"><b>', 400)]
)
def test_the_form_says_what_is_wrong_and_keeps_what_was_typed(
    client: FlaskClient, target: int, amount: str, status: int
) -> None:
    values = {"source_id": ADA, "target_id": target, "amount": amount}
    response = client.post("/", data=values)
    assert response.status_code == status
    assert 'role="alert"' in response.text
    assert '<option value="1" selected>' in response.text
    assert "<b>" not in response.text
    assert balances(client) == {"Ada": "1000.00", "Grace": "500.00", "Piggy bank": "80.00"}


def test_the_tables_are_created_once(app: Flask) -> None:
    for _ in range(2):
        result = app.test_cli_runner().invoke(args=["create-tables"])
        assert result.exit_code == 0, result.output
    assert len(balances(app.test_client())) == 3


# -- what it sends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "verbs"),
    [
        ("/accounts", 200, ["SELECT"]),
        ("/accounts/1", 200, ["SELECT"]),
        ("/accounts/99", 404, ["SELECT"]),
        ("/", 200, ["SELECT", "SELECT"]),
        ("/accounts/1/overview", 200, ["SELECT", "SELECT"]),
        ("/accounts/1/overview?currency=XXX", 400, ["SELECT"]),
        ("/accounts/x", 404, []),
    ],
)
def test_a_read_sends_its_selects_alone(
    client: FlaskClient, wire: WireProxy, path: str, status: int, verbs: list[str]
) -> None:
    move(client, ADA, GRACE, 1)  # for the page to have something to show
    with wire.record() as recording:
        assert client.get(path).status_code == status
    assert recording.verbs == verbs
    assert recording.round_trips == len(verbs)
    assert recording.idle_in_transaction == 0


def test_no_transaction_is_open_while_another_service_makes_the_bank_wait(
    client: FlaskClient, wire: WireProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_meanwhile: list[int] = []

    def rate(currency: str) -> Decimal:
        open_meanwhile.append(wire.transactions_open)
        return Decimal(1)

    monkeypatch.setattr(bank, "exchange_rate", rate)
    assert client.get("/accounts/1/overview").status_code == 200
    assert open_meanwhile == [0]


def test_opening_an_account_looks_and_inserts(client: FlaskClient, wire: WireProxy) -> None:
    values = {"owner": "Hopper", "balance": 20}
    with wire.record() as created:
        assert client.post("/accounts", json=values).status_code == 201
    with wire.record() as found:
        assert client.post("/accounts", json=values).status_code == 200
    assert created.verbs == ["SELECT", "INSERT"]
    assert created.round_trips == 2
    assert (found.verbs, found.round_trips) == (["SELECT"], 1)


def test_a_transfer_is_one_transaction(client: FlaskClient, wire: WireProxy) -> None:
    with wire.record() as recording:
        assert move(client, ADA, GRACE, 1)[0] == 201
    inside = ["SELECT", "UPDATE", "UPDATE", "INSERT"]
    assert recording.verbs == ["BEGIN", *inside, "COMMIT", "SELECT"]
    assert "FOR UPDATE" in recording.statements[1]
    assert recording.round_trips <= len(inside) + 2 + 1


def own_verbs(recording: Recording) -> list[str]:
    """The verbs, without psycopg's forgetting of what it prepared, after a ROLLBACK."""
    return [verb for verb in recording.verbs if verb != "DEALLOCATE"]


def test_a_transfer_that_fails_half_way_is_rolled_back(
    client: FlaskClient, wire: WireProxy
) -> None:
    with wire.record() as recording:
        assert move(client, ADA, PIGGY_BANK, 50)[0] == 409
    assert own_verbs(recording) == ["BEGIN", "SELECT", "UPDATE", "UPDATE", "ROLLBACK"]
    assert wire.transactions_open == 0


def test_a_transfer_to_nobody_is_rolled_back(client: FlaskClient, wire: WireProxy) -> None:
    with wire.record() as recording:
        assert move(client, ADA, 99, 1)[0] == 404
    assert recording.verbs == ["BEGIN", "SELECT", "ROLLBACK"]


def test_a_form_that_is_refused_shows_the_page_outside_the_transaction(
    client: FlaskClient, wire: WireProxy
) -> None:
    values = {"source_id": ADA, "target_id": PIGGY_BANK, "amount": "50"}
    with wire.record() as recording:
        assert client.post("/", data=values).status_code == 409
    assert own_verbs(recording)[-3:] == ["ROLLBACK", "SELECT", "SELECT"]


def test_accounts_are_locked_in_the_same_order_whoever_pays(app: Flask) -> None:
    for source, target in ((ADA, GRACE), (GRACE, ADA)):
        with app.app_context(), db.session.begin():
            assert list(Account.lock(source, target)) == [ADA, GRACE]


# -- the demo --------------------------------------------------------------------------------------

FIGURES = re.compile(r"(\d+) round trips?, ([\d.]+) ms idle in a transaction")
OPEN = re.compile(r"The bank is open: (http://127\.0\.0\.1:\d+/)")


class Demo:
    """The demo, run by a process of its own.

    :param database_url: ``DATABASE_URL``; empty for an embedded server.
    """

    def __init__(self, database_url: str, *arguments: str, directory: Path) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-m", "examples.bank.demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "DATABASE_URL": database_url, "TMPDIR": str(directory)},
        )

    def read_to(self, pattern: str | re.Pattern[str]) -> re.Match[str]:
        """Read what it prints up to a line with this pattern."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(pattern, line)
            if found:
                return found
        pytest.fail(f"It ended before {pattern}: {self.process.communicate()[1]}")

    def end(self, by: signal.Signals | None = None) -> tuple[int, str, str]:
        """Let it end, or end it.

        :returns: Its exit status and what it printed.
        """
        if by is not None:
            self.process.send_signal(by)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err

    def remains(self) -> list[str]:
        """What is left of it: files in its temporary directory, processes that know of it."""
        return [*map(str, self.directory.iterdir()), *self._processes()]

    def leaves_nothing(self) -> bool:
        """Whether nothing is left of it, once the processes that are ending have ended."""
        # PostgreSQL's is there for a moment longer than the file by which pg_ctl knows of it.
        give_up = time.monotonic() + 60
        while (remains := self.remains()) and time.monotonic() < give_up:
            time.sleep(0.05)
        return remains == []

    def _processes(self) -> Iterator[str]:
        wanted = str(self.directory).encode()
        for process in Path("/proc").glob("[0-9]*"):  # on Linux
            with suppress(OSError):  # it has just ended, or is not ours to look at
                command = (process / "cmdline").read_bytes()
                if wanted in command or wanted in (process / "environ").read_bytes():
                    yield command.replace(b"\0", b" ").decode()


@pytest.fixture
def demo() -> Iterator[Callable[..., Demo]]:
    """Starts demos; each is killed if the test has not ended it."""
    with ExitStack() as stack:

        def start(database_url: str, *arguments: str) -> Demo:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            # PostgreSQL runs as another user where we are root, and has to get there.
            directory.chmod(0o1777)
            demo = Demo(database_url, *arguments, directory=directory)
            stack.enter_context(demo.process)
            stack.callback(demo.process.kill)
            return demo

        yield start


def schemas(url: str) -> list[str]:
    """The schemas in a database that PostgreSQL did not make itself."""
    with create_engine(url, poolclass=NullPool).connect() as connection:
        names = connection.scalars(text("SELECT nspname FROM pg_namespace")).all()
    return [name for name in names if not name.startswith(("pg_", "information_schema"))]


def test_the_demo_prints_what_the_contract_says(
    demo: Callable[..., Demo], url: str, driver: str
) -> None:
    run = demo(url)
    status, out, err = run.end()
    assert (status, err) == (0, "")
    assert schemas(url) == ["public"]
    assert run.leaves_nothing()
    assert out.isascii()
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 100

    # One line for each request: what was measured with ours, and on stock.
    found = [FIGURES.findall(line) for line in out.splitlines() if "round trip" in line]
    measured = [line for line in found if line]
    assert all(len(line) == 2 for line in measured)
    ours = [int(trips) for (trips, _), _ in measured]
    stock = [int(trips) for _, (trips, _) in measured]
    read, page, wait, opened, there, moved, failed, missing = range(8)
    assert len(ours) == 8
    assert (ours[read], stock[read]) == (1, 3)
    assert (ours[page], stock[page]) == (2, 4)
    assert (ours[wait], stock[wait]) == (2, 4)
    assert (ours[opened], stock[opened]) == (2, 7)
    assert (ours[there], stock[there]) == (1, 3)
    # psycopg sends both UPDATE in a pipeline, and may DEALLOCATE what it prepared after a ROLLBACK.
    assert ours[moved] <= 7 < stock[moved]
    assert ours[failed] <= 5 + (driver == "psycopg")
    assert (ours[missing], stock[missing]) == (1, 3)
    for request in (read, page, wait, there, missing):
        assert measured[request][0][1] == "0"
    assert float(measured[wait][1][1]) >= 300

    assert out.count("Ada: 980.00 before, 980.00 after") == 2
    assert out.count("Piggy bank: 80.00 before, 80.00 after") == 2
    assert f"8 requests: {sum(ours)}, on stock {sum(stock)}." in out
    assert f"that waits: 0 ms, on stock {measured[wait][1][1]} ms." in out
    assert "transfer that failed: 0, on stock 0." in out


def test_the_demo_serves_until_ctrl_c(demo: Callable[..., Demo]) -> None:
    run = demo("", "--serve")
    base = run.read_to(OPEN)[1]
    with urlopen(base) as page:
        shown = page.read().decode()
    assert "Piggy bank" in shown
    assert "asks a slow service" in shown
    assert "What <code>GET /</code> has sent to PostgreSQL" in shown
    assert [trips for trips, _ in FIGURES.findall(shown)] == ["2", "4"]
    with urlopen(f"{base}?currency=EUR") as page:
        shown = page.read().decode()
    assert "in EUR" in shown
    (ours, _), (stock, waited) = FIGURES.findall(shown)
    assert (ours, stock) == ("2", "4")
    assert float(waited) >= 300
    values = urlencode({"source_id": 1, "target_id": 2, "amount": "10.00"}).encode()
    with urlopen(base, values) as page:  # it follows to the page
        shown = page.read().decode()
    assert "What <code>POST /</code> has sent to PostgreSQL" in shown
    assert "What <code>GET /</code> has sent to PostgreSQL" in shown
    for path in ("nowhere", "caf%C3%A9", "%ff"):
        with pytest.raises(HTTPError) as refused:
            urlopen(f"{base}{path}")
        with refused.value as error:
            assert error.code == 404
            assert "error" in json.loads(error.read())
    assert run.remains() != []
    status, _, err = run.end(by=signal.SIGINT)
    assert (status, err) == (0, "")
    assert run.leaves_nothing()


def test_the_demo_leaves_alone_what_is_in_the_database(demo: Callable[..., Demo], url: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE account AS SELECT 'mine' AS owner"))
    run = demo(url, "--serve")
    run.read_to(OPEN)
    assert len(schemas(url)) == 3
    status, _, err = run.end(by=signal.SIGTERM)
    assert (status, err) == (128 + signal.SIGTERM, "")
    assert schemas(url) == ["public"]
    assert run.leaves_nothing()
    with engine.connect() as connection:
        assert connection.scalars(text("SELECT owner FROM account")).all() == ["mine"]


@pytest.mark.parametrize(
    ("moment", "by"),
    [
        ("PostgreSQL", signal.SIGINT),
        ("2. The HTML page", signal.SIGTERM),  # the next request is the one that waits
        ("7. A transfer", signal.SIGHUP),
    ],
)
def test_the_demo_cleans_up_wherever_it_is_interrupted(
    demo: Callable[..., Demo], url: str, moment: str, by: signal.Signals
) -> None:
    run = demo(url)
    run.read_to(moment)
    status, _, err = run.end(by=by)
    assert (status, err) == (128 + by, "")
    assert schemas(url) == ["public"]
    assert run.leaves_nothing()


def test_nothing_runs_on_when_the_demo_is_killed(demo: Callable[..., Demo]) -> None:
    run = demo("", "--serve")
    run.read_to(OPEN)
    run.end(by=signal.SIGKILL)
    assert run.leaves_nothing()


@pytest.mark.parametrize(
    "database_url",
    [
        "nonsense",
        "mysql://root@127.0.0.1/test",
        "postgresql:///test",
        "postgresql://postgres@127.0.0.1:1/test",
        "postgresql+nodriver://postgres@127.0.0.1/test",
    ],
)
def test_the_demo_says_what_to_do_about_a_database_it_cannot_use(
    demo: Callable[..., Demo], database_url: str
) -> None:
    status, _, err = demo(database_url).end()
    assert status == 1
    assert "DATABASE_URL" in err
    assert "Traceback" not in err
