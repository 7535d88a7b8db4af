"""``flask db-transactions``: what is open on the server now."""

from __future__ import annotations

import threading

import pytest
from flask import Flask
from sqlalchemy import create_engine, text, update

from tests.flask.conftest import MakeApp
from tests.flask.support import Database
from tests.library import Author, Onlooker, fill


@pytest.fixture
def app(make_app: MakeApp, url: str) -> Flask:
    fill(url)
    return make_app(Database(), url, SQLALCHEMY_BINDS={"lite": "sqlite://"})


def run(app: Flask, *arguments: str) -> str:
    result = app.test_cli_runner().invoke(args=["db-transactions", *arguments])
    return result.output


def test_the_command_says_that_no_transaction_is_open(app: Flask) -> None:
    assert run(app) == "No transaction is open.\n"


def test_the_longest_transaction_comes_first(app: Flask, url: str, driver: str) -> None:
    connect = {"connect_args": {"application_name": "shop"}}
    named, nameless = create_engine(url, **connect), create_engine(url)
    with named.connect() as first, nameless.connect() as second:
        first.execute(text("SELECT 1 AS one"))
        second.execute(text("SELECT 2 AS two"))
        lines = run(app).splitlines()
        assert [line.strip() for line in lines[1::2]] == ["SELECT 1 AS one", "SELECT 2 AS two"]
        assert "idle in transaction for " in lines[0]
        assert "  shop  " in lines[0]
        assert "(no application_name)" in lines[2]
        assert lines[-1] == "2 transactions open."
        assert "SELECT 2" not in run(app, "--application", "shop")
        assert run(app, "--seconds", "60") == "No transaction is open.\n"
    named.dispose()
    nameless.dispose()


def test_the_command_says_who_waits_for_whom(app: Flask, url: str, onlooker: Onlooker) -> None:
    engine = create_engine(url)
    with engine.connect() as holder, engine.connect() as waiter:
        holder.execute(update(Author).values(age=1))
        pid = holder.scalar(text("SELECT pg_backend_pid()"))
        thread = threading.Thread(target=lambda: waiter.execute(update(Author).values(age=2)))
        thread.start()
        while not onlooker.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            pass
        said = run(app)
        holder.rollback()
        thread.join()
    engine.dispose()
    assert f"blocked by pid {pid}" in said
    assert "waits for Lock: " in said


def test_bad_input_of_the_command_is_refused(app: Flask) -> None:
    assert "The application has no bind 'other': name one with --bind" in run(
        app, "--bind", "other"
    )
    assert "asks PostgreSQL, and this bind is sqlite" in run(app, "--bind", "lite")
    assert "Invalid value for '--seconds'" in run(app, "--seconds", "-1")
