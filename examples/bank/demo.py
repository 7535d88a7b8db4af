"""What the bank sends to PostgreSQL, request by request, beside the same app on stock.

    python -m nox -s demo
    python -m nox -s demo -- --serve
    DATABASE_URL=postgresql://user:password@127.0.0.1:5432/database python -m nox -s demo

The demo starts a PostgreSQL of its own, or creates schemas of its own in the database of
``DATABASE_URL``. It puts a proxy that reads the wire in front of PostgreSQL, starts the app twice
as a server on 127.0.0.1, and sends the same HTTP requests to both. When the demo ends, even by
Ctrl-C, all that it has started is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

try:
    from sqlalchemy import make_url

    from tests.wire import Recording, WireProxy

    from .front import front_server
    from .report import BOLD, DIM, WIDTH, milliseconds, show, show_columns, show_wires
    from .running import (
        DemoError,
        app_server,
        database,
        end_on_signals,
        execute,
        ignore_signals,
        schema,
    )
except ModuleNotFoundError as missing:
    sys.exit(
        f"The demo needs {missing.name}. From the top of the checkout, this installs what it needs"
        " and runs it:\n    python -m pip install nox && python -m nox -s demo"
    )


@dataclass(eq=False)
class Step:
    """One HTTP request that both servers get."""

    title: str
    method: str
    path: str
    expected: int
    body: Mapping[str, object] | None = None


@dataclass(eq=False)
class Answer:
    """What a server answered, and what it sent to PostgreSQL for it."""

    status: int
    body: str
    wire: Recording


# Account 1 is Ada's and 2 is Grace's; 3 is a piggy bank that is almost full.
HOPPER = {"owner": "Hopper", "balance": "20.00"}
TRANSFER = {"source_id": 1, "target_id": 2, "amount": "10.00"}
PAYS, GETS = "Ada", "Piggy bank"
TOO_MUCH_TO_HOLD = {"source_id": 1, "target_id": 3, "amount": "50.00"}

READ = Step("Read one account", "GET", "/accounts/1", 200)
PAGE = Step("The HTML page", "GET", "/", 200)
WAIT = Step("Read, wait for another service, read", "GET", "/accounts/1/overview?currency=EUR", 200)
OPEN = Step("Open an account", "POST", "/accounts", 201, HOPPER)
FIND = Step("Open it again: it is there already", "POST", "/accounts", 200, HOPPER)
MOVE = Step("Transfer", "POST", "/transfers", 201, TRANSFER)
HALF = Step(
    "A transfer that fails half way: the credit breaks a rule",
    "POST",
    "/transfers",
    409,
    TOO_MUCH_TO_HOLD,
)
NONE = Step("An account that is not there", "GET", "/accounts/999", 404)
STEPS = (READ, PAGE, WAIT, OPEN, FIND, MOVE, HALF, NONE)


def main(arguments: list[str]) -> int:
    """Run the demo.

    :param arguments: The arguments of the command line.
    :returns: The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m nox -s demo --",
        description="Show what examples/bank sends to PostgreSQL, beside the same app on stock.",
        epilog="DATABASE_URL, if set, names the server to use; otherwise the demo starts its own.",
    )
    parser.add_argument(
        "--serve", action="store_true", help="leave the bank running after that, until Ctrl-C"
    )
    parser.add_argument(
        "--port",
        type=int,
        choices=range(2**16),
        metavar="PORT",
        default=0,
        help="the port of 127.0.0.1 for it (default: one that is free)",
    )
    options = parser.parse_args(arguments)
    end_on_signals()
    try:
        run(options.serve, options.port)
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # nobody reads the output any more, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def run(serve: bool, port: int) -> None:
    """Start everything, compare both servers, serve if asked to, and remove everything again.

    :param serve: Whether to leave the bank running until Ctrl-C.
    :param port: The port of the bank that is left running; 0 for a free port.
    """
    with ExitStack() as stack:
        server, url = stack.enter_context(database(os.environ.get("DATABASE_URL")))
        release = execute(url, "SHOW server_version").split()[0]
        wire = stack.enter_context(WireProxy(server.host, server.port))
        execute(wire.url(url), "SELECT 1")
        name = f"bank_demo_{uuid.uuid4().hex[:12]}"
        bases: list[str] = []
        for suffix, arguments in (("ours", []), ("stock", ["--stock"])):
            within = stack.enter_context(schema(url, f"{name}_{suffix}"))
            bases.append(stack.enter_context(app_server(wire.url(within), *arguments)))
        stack.callback(ignore_signals)  # runs first, so that nothing disturbs the cleaning up
        show(
            f"PostgreSQL {release}, {make_url(url).get_driver_name()}, "
            f"SQLAlchemy {version('sqlalchemy')}, Flask-SQLAlchemy {version('flask-sqlalchemy')}",
            DIM,
        )
        compare(wire, bases)
        if serve:
            keep_open(stack.enter_context(front_server(wire, bases, port)))


def keep_open(base: str) -> None:
    """Leave the bank open until Ctrl-C, with which serving is meant to end, or until nox is gone.

    :param base: The URL of the front, which shows under each page what the request has sent.
    """
    parent = os.getppid()
    try:
        # As soon as somebody has read this line, Ctrl-C may come.
        show(f"\nThe bank is open: {base}/    Ctrl-C closes it.", BOLD)
        # A nox that is killed can't tell this process.
        while "NOX_CURRENT_SESSION" not in os.environ or os.getppid() == parent:
            time.sleep(1)
    except SystemExit as end:
        if end.code != 128 + signal.SIGINT:
            raise


def compare(wire: WireProxy, bases: list[str]) -> None:
    """Send each request to both servers, and print what they send to PostgreSQL for it.

    :param wire: The proxy in front of PostgreSQL.
    :param bases: The URLs of the server with fictive_sqlalchemy and of the server with stock.
    :raises DemoError: If the servers do not answer the same, or do not answer as expected.
    """
    show("The same app, the same HTTP requests, and what goes over the wire to PostgreSQL.")
    show(
        "A round trip is a message to PostgreSQL that the app waits for an answer to. A connection"
    )
    show("that is idle in a transaction keeps its locks, and nobody else can use it.\n")
    show_columns("with fictive_sqlalchemy", "on stock Flask-SQLAlchemy", (BOLD, BOLD))
    for base in bases:
        # The first request costs more: connections are opened, and statements are compiled.
        balances(base)
        for step in (READ, PAGE, MOVE):
            ask(base, step)
    answers: dict[Step, list[Answer]] = {}
    changed = [0, 0]
    for number, step in enumerate(STEPS, 1):
        before = [balances(base) for base in bases] if step is HALF else []
        answers[step] = [recorded(wire, base, step) for base in bases]
        show(f"\n{number}. {step.title}", BOLD)
        body = f" {json.dumps(step.body)}" if step.body else ""
        show(f"   {step.method} {step.path}{body} -> {answers[step][0].status}", DIM)
        show_wires(*(answer.wire for answer in answers[step]))
        check(step, answers[step])
        if step is HALF:
            changed = show_changes(before, [balances(base) for base in bases])
    summarize(answers, changed)
    if any(changed):
        raise DemoError("A transfer that failed has changed balances: see above.")


def recorded(wire: WireProxy, base: str, step: Step) -> Answer:
    """Send a request and record what it makes the server send to PostgreSQL.

    :param wire: The proxy in front of PostgreSQL.
    :param base: The server's URL.
    :param step: The request.
    """
    with wire.record() as recording:
        status, body = ask(base, step)
    return Answer(status, body, recording)


def ask(base: str, step: Step) -> tuple[int, str]:
    """Send a request and return the status and the body of the answer."""
    data = json.dumps(step.body).encode() if step.body else None
    headers = {"Content-Type": "application/json"}
    request = Request(base + step.path, data, headers, method=step.method)
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except URLError as error:
        raise DemoError(f"The app's server at {base} does not answer: {error.reason}") from None


def balances(base: str) -> dict[str, str]:
    """Return the balances by owner, as a server shows them."""
    _, body = ask(base, Step("", "GET", "/accounts", 200))
    return {account["owner"]: account["balance"] for account in json.loads(body)}


def check(step: Step, answers: list[Answer]) -> None:
    """Check that both servers have done the same, and the right thing.

    :raises DemoError: If they have not.
    """
    said = [(answer.status, re.sub(r'"at":"[^"]*"', "", answer.body)) for answer in answers]
    if said[0] != said[1] or said[0][0] != step.expected:
        raise DemoError(
            f"Both should answer {step.expected}, and the same. What an app says of an error stands"
            f" above.\nours:  {said[0]}\nstock: {said[1]}"
        )


def show_changes(before: list[dict[str, str]], after: list[dict[str, str]]) -> list[int]:
    """Print the balances of the two accounts of a transfer.

    :param before: What :func:`balances` returned before the transfer, for each server.
    :param after: What :func:`balances` returned after the transfer, for each server.
    :returns: How many of all balances the transfer has changed, for each server.
    """
    pairs = list(zip(before, after, strict=True))
    for owner in (PAYS, GETS):
        ours, stock = (f"{owner}: {b[owner]} before, {a[owner]} after" for b, a in pairs)
        show_columns(ours, stock)
    return [sum(b[owner] != a[owner] for owner in b) for b, a in pairs]


def summarize(answers: dict[Step, list[Answer]], changed: list[int]) -> None:
    """Print three lines, computed from what was measured."""
    trips = [sum(pair[i].wire.round_trips for pair in answers.values()) for i in (0, 1)]
    waits = [milliseconds(answer.wire.idle_in_transaction) for answer in answers[WAIT]]
    show("\n" + "-" * WIDTH)
    for line in (
        f"Round trips for the same {len(answers)} requests: {trips[0]}, on stock {trips[1]}.",
        f"Idle in a transaction in the request that waits: {waits[0]}, on stock {waits[1]}.",
        f"Balances changed by the transfer that failed: {changed[0]}, on stock {changed[1]}.",
    ):
        show(line, BOLD)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
