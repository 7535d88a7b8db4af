"""Scripts and `flask` commands, as processes: however they end, nothing is left half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from fictive_sqlalchemy import create_engine
from tests.library import Onlooker, fill
from tests.wire import Message, WireProxy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

PROGRAM = """
import atexit
import os
import signal
import sys

import click
from flask import Blueprint, Flask
from flask.cli import with_appcontext
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInSession, create_engine, unit_of_work
from fictive_sqlalchemy.ext.flask.builtins import SQLAlchemy
from tests.library import Author

# A shell that runs the tests in the background lets them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def say(what):
    print(what, flush=True)
    return sys.stdin.readline().strip()


def work(session):
    session.add(Author(name="one"))
    session.flush()
    told = say("inside")
    if told == "raise":
        raise ZeroDivisionError
    if told == "exit":
        sys.exit(3)
    if told == "usage":
        raise click.UsageError("no such thing")
    session.add(Author(name="two"))


url = os.environ["DATABASE_URL"]
app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = url
db = SQLAlchemy(app)
engine = create_engine(url)
Session = sessionmaker(engine, class_=OptInSession)
unit_of_work_function = unit_of_work(Session)(work)
tasks = Blueprint("tasks", __name__)


@app.cli.command()
def command():
    db.session.get(Author, 1)
    with db.session.begin():
        work(db.session)


@tasks.cli.command()
def of_a_blueprint():
    db.session.get(Author, 1)
    with unit_of_work(db.session) as session:
        work(session)


@click.command()
@with_appcontext
def with_appcontext():
    with db.session.begin():
        work(db.session)


app.register_blueprint(tasks)
app.cli.add_command(with_appcontext)


def begin():
    with Session() as session:
        session.get(Author, 1)
        with session.begin():
            work(session)


def begin_of_the_sessionmaker():
    with Session.begin() as session:
        work(session)


def block_of_a_unit():
    with unit_of_work(Session) as session:
        work(session)


def reader():
    with Session() as session:
        session.get(Author, 1)
        say("outside")
        session.get(Author, 2)


@atexit.register
def report():
    with app.app_context():
        engines = [engine, db.engine]
    print("connections in use:", sum(one.pool.checkedout() for one in engines))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
"""

SCRIPTS = {
    "begin": ["program.py", "begin"],
    "begin of the sessionmaker": ["program.py", "begin_of_the_sessionmaker"],
    "block of a unit": ["program.py", "block_of_a_unit"],
    "function that is a unit": ["program.py", "unit_of_work_function"],
    "reader": ["program.py", "reader"],
}
COMMANDS = {
    "flask command": ["-m", "flask", "--app", "program", "command"],
    "of a blueprint": ["-m", "flask", "--app", "program", "tasks", "of-a-blueprint"],
    "with_appcontext": ["-m", "flask", "--app", "program", "with-appcontext"],
}
WAYS = SCRIPTS | COMMANDS
WRITERS = sorted(WAYS.keys() - {"reader"})
FEW = ["begin", "flask command"]

Start = Callable[..., "Program"]


class Program:
    """The program above, as a process of its own.

    :param directory: Where it is.
    :param arguments: What Python gets.
    :param url: The database.
    """

    def __init__(self, directory: Path, arguments: list[str], url: str) -> None:
        environment = {
            **os.environ,
            "DATABASE_URL": url,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until(self, it_says: str) -> None:
        """Wait until it says where it is; it waits for an answer then."""
        assert self.process.stdout is not None
        said = self.process.stdout.readline().strip()
        assert said == it_says, said or self.process.communicate()[1]

    def end(self, answer: str = "") -> tuple[int, str, str]:
        """Answer and wait for its end; return its status, and what it printed."""
        printed, errors = self.process.communicate(f"{answer}\n", timeout=60)
        return self.process.returncode, printed, errors


@pytest.fixture
def onlooker(url: str) -> Iterator[Onlooker]:
    fill(url)
    onlooker = Onlooker(url)
    yield onlooker
    onlooker.close()


@pytest.fixture
def start(tmp_path: Path, wire_url: str, onlooker: Onlooker) -> Iterator[Start]:
    """``start(way)`` starts the program; no process is left at the end."""
    started: list[Program] = []
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")

    def start(way: str) -> Program:
        started.append(Program(tmp_path, WAYS[way], wire_url))
        return started[-1]

    yield start
    for program in started:
        if program.process.poll() is None:
            program.process.kill()
        program.process.communicate()


def states(onlooker: Onlooker) -> list[str]:
    """Return what the program's connections do, as the server sees them."""
    return onlooker.column(
        "SELECT state FROM pg_stat_activity WHERE datname = current_database() "
        "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )


def assert_gone(onlooker: Onlooker) -> None:
    """Wait until the server knows of no connection any more."""
    deadline = time.monotonic() + 30
    while found := states(onlooker):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


@pytest.mark.parametrize("way", WRITERS)
def test_a_script_commits_and_closes(start: Start, onlooker: Onlooker, way: str) -> None:
    program = start(way)
    program.wait_until("inside")
    assert states(onlooker) == ["idle in transaction"]
    assert onlooker.names() == []
    status, printed, errors = program.end()
    assert (status, errors) == (0, "")
    assert printed == "connections in use: 0\n"
    assert onlooker.names() == ["one", "two"]
    assert_gone(onlooker)


ENDS = {"raise": (1, "ZeroDivisionError"), "exit": (3, ""), "usage": (2, "no such thing")}


@pytest.mark.parametrize(
    ("way", "answer"),
    [(way, "raise") for way in WRITERS]
    + [(way, "exit") for way in FEW]
    + [("flask command", "usage")],
)
def test_an_exception_leaves_nothing_half_done(
    start: Start, onlooker: Onlooker, way: str, answer: str
) -> None:
    program = start(way)
    program.wait_until("inside")
    status, printed, errors = program.end(answer)
    assert status == ENDS[answer][0]
    assert ENDS[answer][1] in errors
    assert "connections in use: 0" in printed
    assert onlooker.names() == []
    assert_gone(onlooker)


@pytest.mark.parametrize(
    ("way", "name"),
    [(way, "SIGINT") for way in WRITERS]
    + [(way, name) for way in FEW for name in ("SIGTERM", "SIGKILL")],
)
def test_a_signal_inside_leaves_nothing_half_done(
    start: Start, onlooker: Onlooker, way: str, name: str
) -> None:
    program = start(way)
    program.wait_until("inside")
    assert states(onlooker) == ["idle in transaction"]
    sent = signal.Signals[name]
    program.process.send_signal(sent)
    program.process.wait(60)
    status, printed, errors = program.end()
    if name == "SIGINT":
        assert ("Aborted!" if way in COMMANDS else "KeyboardInterrupt") in errors
        assert "connections in use: 0" in printed
    assert status == (1 if name == "SIGINT" and way in COMMANDS else -sent)
    assert onlooker.names() == []
    assert_gone(onlooker)


@contextmanager
def signal_at(wire: WireProxy, verb: str, program: Program, name: str) -> Iterator[list[str]]:
    """Send a signal while a statement is on its way, when the server has not got it yet."""
    sent: list[str] = []

    def before_forward(message: Message) -> None:
        if message.is_statement and message.verb == verb and not sent:
            sent.append(message.text)
            program.process.send_signal(signal.Signals[name])
            if name != "SIGINT":
                program.process.wait(60)

    wire.before_forward = before_forward
    try:
        yield sent
    finally:
        wire.before_forward = None


@pytest.mark.parametrize(
    ("way", "name", "verb"),
    [(way, "SIGINT", verb) for way in FEW for verb in ("BEGIN", "INSERT", "COMMIT")]
    + [("begin", name, "COMMIT") for name in ("SIGTERM", "SIGKILL")],
)
def test_a_signal_while_a_statement_is_on_its_way_leaves_nothing_half_done(
    start: Start, wire: WireProxy, onlooker: Onlooker, way: str, name: str, verb: str
) -> None:
    program = start(way)
    with signal_at(wire, verb, program, name) as sent:
        status, _, _ = program.end()
    assert sent
    assert status != 0
    assert_gone(onlooker)
    stored = onlooker.names()
    # What the server got of a COMMIT, it does: then all is stored.
    assert stored == [] or (verb == "COMMIT" and stored == ["one", "two"])


def test_ctrl_c_while_the_database_keeps_it_waiting_leaves_nothing_half_done(
    start: Start, onlooker: Onlooker, url: str, driver: str
) -> None:
    engine = create_engine(url)
    program = start("begin")
    with engine.begin() as connection:
        connection.execute(sa.text("LOCK TABLE author IN SHARE MODE"))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        deadline = time.monotonic() + 60
        while not onlooker.scalar(waiting):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        program.process.send_signal(signal.SIGINT)
        if driver == "psycopg":  # psycopg2 looks at the signal after the answer
            program.process.wait(60)
    status, _, errors = program.end()
    engine.dispose()
    assert status == -signal.SIGINT, errors
    assert "KeyboardInterrupt" in errors
    assert onlooker.names() == []
    assert_gone(onlooker)


def test_a_script_that_waits_between_reads_has_no_transaction_open(
    start: Start, onlooker: Onlooker
) -> None:
    program = start("reader")
    program.wait_until("outside")
    assert states(onlooker) == ["idle"]
    assert program.end()[:2] == (0, "connections in use: 0\n")
