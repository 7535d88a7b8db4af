"""What records, reports and guards keeps nothing alive, changes nothing, and does not end early."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
import time
import types
import weakref
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, select, text, update
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine, guarding
from fictive_sqlalchemy._core import observing, places
from fictive_sqlalchemy._core.recorder import of_this_context
from fictive_sqlalchemy._core.records import Transaction
from fictive_sqlalchemy._core.watchdog import Watchdog
from fictive_sqlalchemy.guarding import Guard, WaitingInTransaction, allow_waiting
from fictive_sqlalchemy.recording import record
from fictive_sqlalchemy.reporting import Report, Reporter
from fictive_sqlalchemy.testing import isolate
from tests.calls import calls_of
from tests.interruptions import HardStop, Interruption
from tests.library import Author, authors, opened
from tests.wire import WireProxy

READ = select(Author.name).where(Author.id == 1)


class TestNothingIsKept:
    def test_nothing_is_kept_of_the_session_that_was_recorded(
        self, sessions: sessionmaker[OptInSession]
    ) -> None:
        session = sessions()
        known = weakref.ref(session)
        with record(session) as seen:
            session.execute(READ).all()
        session.close()
        del session
        gc.collect()
        assert known() is None
        assert seen.statement_count == 1

    def test_nothing_is_kept_of_engines_that_were_forgotten(
        self, engine: OptInEngine, url: str
    ) -> None:
        with record(engine):
            another = create_engine(url)
            with another.connect() as connection:
                connection.execute(READ).all()
            known = weakref.ref(another.dialect)
            another.dispose()
            del another, connection
            gc.collect()
            assert known() is None

    def test_nothing_is_kept_of_long_sql(self, session: OptInSession) -> None:
        with record(session):
            session.execute(text(f"SELECT '{'x' * 100_000}'"))
        assert all(sys.getsizeof(key) < 100 for key in places._depths)

    def test_nothing_is_kept_of_guarded_transactions(
        self, engine: OptInEngine, sessions: sessionmaker[OptInSession]
    ) -> None:
        def work() -> None:
            with sessions() as session, session.begin():
                session.execute(READ).all()
                time.sleep(0)

        with Guard("log", engine) as guard:
            for _ in range(5):
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
            gc.collect()
            assert not [each for each in gc.get_referrers(guard) if isinstance(each, Transaction)]
            assert not [each for each in gc.get_objects() if isinstance(each, Transaction)]


class TestNumbers:
    def test_numbers_go_on_beyond_what_is_kept(self, session: OptInSession) -> None:
        with record(session, keep=1) as seen, record(session) as all_of_it:
            for _ in range(4):
                with session.begin():
                    session.execute(READ).all()
                    session.execute(READ).all()
                session.give_back()
        assert (len(seen.sent), len(seen.transactions), len(seen.connections)) == (1, 1, 1)
        for name in ("statement_count", "round_trips", "transaction_count"):
            assert getattr(seen, name) == getattr(all_of_it, name)
        for name in ("duration", "open", "waiting", "held", "waited"):
            assert getattr(seen, name) == pytest.approx(getattr(all_of_it, name))
        assert f"8 statements, {seen.round_trips} round trips, 4 transactions" in str(seen)

    def test_numbers_count_no_transaction_that_has_sent_nothing(
        self, session: OptInSession
    ) -> None:
        with record(session) as seen, session.begin():
            session.connection()
        assert seen.transaction_count == 0
        assert "transaction" not in seen.summary()

    def test_numbers_count_no_begin_with_the_level_autocommit(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        with engine.connect() as connection:
            connection.execute(READ).all()
        with record(engine) as seen, wire.record() as recording, engine.connect() as connection:
            with connection.execution_options(isolation_level="AUTOCOMMIT").begin():
                connection.execute(READ).all()
            connection.execute(READ).all()
        assert seen.transactions == []
        assert seen.round_trips == recording.round_trips == 2

    def test_the_transaction_of_a_session_that_was_forgotten_ends(
        self, engine: OptInEngine, sessions: sessionmaker[OptInSession]
    ) -> None:
        with record(engine) as seen:
            session = sessions()
            session.begin()
            session.execute(READ).all()
            del session
            gc.collect()
        assert [transaction.outcome for transaction in seen.transactions] == ["rolled back"]
        assert not seen.connections[0].is_held

    def test_the_use_of_a_connection_ends_under_isolation(self, engine: OptInEngine) -> None:
        with isolate(engine), record(engine) as seen, OptInSession(engine) as session:
            session.execute(READ).all()
        assert [use.is_held for use in seen.connections] == [False]

    def test_numbers_count_prepare_as_a_statement(self, engine: OptInEngine) -> None:
        with record(engine) as seen, engine.begin() as connection:
            connection.exec_driver_sql("PREPARE reading AS SELECT 1")
            connection.exec_driver_sql("DEALLOCATE reading")
        assert seen.statement_count == 2

    @pytest.mark.parametrize("size", [None, 3])
    def test_round_trips_of_batches_are_counted_as_on_the_wire(
        self, library: None, wire_url: str, wire: WireProxy, driver: str, size: Any
    ) -> None:
        if driver != "psycopg2":
            pytest.skip("psycopg 3 has no such mode")
        options: Any = {} if size is None else {"executemany_batch_page_size": size}
        one_of_them = authors.c.id == sa.bindparam("i")
        with opened(wire_url, executemany_mode="values_plus_batch", **options) as other:
            other.connect().close()
            with record(other) as seen, wire.record() as recording, other.begin() as connection:
                connection.execute(
                    update(authors).where(one_of_them).values(age=sa.bindparam("n")),
                    [{"i": i, "n": i} for i in range(1, 8)],
                )
        assert seen.round_trips == recording.round_trips, f"{seen}\n{recording}"

    @pytest.mark.parametrize("inside", [False, True])
    def test_round_trips_of_a_stream_that_fails_are_counted_as_on_the_wire(
        self, session: OptInSession, wire: WireProxy, inside: bool
    ) -> None:
        failing = text("SELECT 10 / (5 - n) FROM generate_series(1, 9) n")
        session.execute(READ).all()
        with record(session) as seen, wire.record() as recording, suppress(exc.DBAPIError):  # noqa: SIM117
            with session.begin() if inside else nullcontext():
                session.execute(failing.execution_options(yield_per=2)).all()
        assert seen.round_trips == recording.round_trips, f"{seen}\n{recording}"

    def test_the_use_of_a_connection_that_is_detached_ends(self, engine: OptInEngine) -> None:
        with record(engine) as seen:
            connection = engine.connect()
            connection.execute(READ).all()
            assert seen.connections[0].is_held
            connection.detach()
            assert not seen.connections[0].is_held
            connection.close()


class TestWhatOthersDo:
    def test_a_wrapped_function_of_the_dialect_stays(self, engine: OptInEngine) -> None:
        def wrapped(*args: Any, **kwargs: Any) -> None:
            called.append(args[1])
            send(*args, **kwargs)

        called: list[str] = []
        with record(engine):
            dialect: Any = engine.dialect
            send, dialect.do_execute = dialect.do_execute, wrapped
        with record(engine) as seen, engine.connect() as connection:
            connection.execute(READ).all()
        assert len(called) == seen.statement_count == 1

    def test_a_function_of_the_users_own_may_make_the_cursors(
        self, engine: OptInEngine, session: OptInSession, driver: str
    ) -> None:
        if driver != "psycopg2":
            pytest.skip("psycopg 3 takes classes alone")
        import psycopg2.extensions

        connection: Any = session.connection().connection.dbapi_connection
        connection.cursor_factory = lambda *args, **kwargs: psycopg2.extensions.cursor(
            *args, **kwargs
        )
        with record(engine), session.begin():
            found = session.scalars(select(Author).execution_options(yield_per=2)).all()
        assert len(found) == 3

    def test_statements_of_the_handler_of_a_signal_are_recorded(self, engine: OptInEngine) -> None:
        from fictive_sqlalchemy._core.recorder import recorder

        with recorder._lock, record(engine) as seen, engine.connect() as connection:
            connection.execute(READ).all()
        assert seen.statement_count == 1


class TestUnits:
    def test_a_unit_that_outlives_a_request_in_a_copy_of_its_context_is_its_own(
        self, engine: OptInEngine, sessions: sessionmaker[OptInSession]
    ) -> None:
        def later() -> None:
            with sessions() as session:
                session.execute(READ).all()
            with reporter.unit("later"), sessions() as session:
                session.execute(READ).all()

        reports: list[Report] = []
        with Reporter(engine, callback=reports.append) as reporter:
            with reporter.unit("request"):
                context = copy_context()
            context.run(later)
        assert [(each.name, each.recording.round_trips) for each in reports] == [
            ("request", 0),
            ("later", 1),
        ]

    def test_a_unit_that_is_interrupted_does_not_hide_the_next(self, engine: OptInEngine) -> None:
        def work() -> None:
            with reporter.unit("interrupted"):
                pass

        hidden: list[str | None] = []
        number = 0
        with Reporter(engine, slow_transaction=None) as reporter:
            while True:
                number += 1
                interruption = Interruption(number, HardStop)
                interruption.run(work)
                with reporter.unit("next") as report:
                    if report is None:
                        hidden.append(interruption.place)
                of_this_context.set(())
                if interruption.place is None:
                    break
        assert not hidden

    def test_a_reporter_that_fails_leaves_the_units_of_the_others_in_order(
        self, engine: OptInEngine
    ) -> None:
        def fails(name: str) -> Any:
            raise KeyError

        with Reporter(engine, slow_transaction=None) as reporter:
            observing.reporters += (fails,)
            try:
                with pytest.raises(KeyError), observing.reported(lambda: "work"):
                    pass
                assert of_this_context.get() == ()
            finally:
                observing.reporters = observing.reporters[:-1]
            assert reporter.is_on

    def test_a_watchdog_leaves_what_a_fork_has_copied_to_the_parent(self) -> None:
        def begun() -> Transaction:
            transaction = Transaction(None, "BEGIN", None, False)
            transaction.started = time.perf_counter()
            return transaction

        receiving, sending = os.pipe()
        watchdog = Watchdog(0.05, lambda transaction, stack: os.write(sending, b"x"))
        of_parent = begun()
        watchdog.watch(of_parent)
        if not (child := os.fork()):
            os.close(receiving)
            watchdog.watch(begun())
            time.sleep(0.3)
            os._exit(0)
        of_parent.outcome = "committed"
        watchdog.stop()
        os.close(sending)
        os.waitpid(child, 0)
        assert os.read(receiving, 100) == b"x"
        os.close(receiving)

    def test_a_watchdog_goes_on_after_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        def alarm(transaction: Transaction, stack: str) -> None:
            told.append(stack)
            raise KeyError("of a filter")

        told: list[str] = []
        watchdog = Watchdog(0.01, alarm)
        for number in (1, 2):
            transaction = Transaction(None, "BEGIN", None, False)
            transaction.started = time.perf_counter()
            watchdog.watch(transaction)
            end = time.monotonic() + 5
            while len(told) < number and time.monotonic() < end:
                time.sleep(0.01)
        watchdog.stop()
        assert len(told) == 2
        assert "of a filter" in capsys.readouterr().err


class TestGuards:
    def test_guards_do_not_fail_where_a_library_is_being_imported(
        self, engine: OptInEngine, session: OptInSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(guarding, "_heard_of", {"time"})
        for name in ("httpx", "celery.app.base"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        with Guard("raise", engine), session.begin():
            session.execute(READ).all()
        assert guarding._heard_of == {"time"}

    def test_guards_tell_threads_apart_whose_ident_is_the_same(
        self, engine: OptInEngine, sessions: sessionmaker[OptInSession]
    ) -> None:
        def leave_open() -> None:
            session = sessions()
            session.begin()
            session.execute(READ).all()
            left.append((session, threading.get_ident()))

        def wait() -> None:
            idents.append(threading.get_ident())
            time.sleep(0.001)
            waited.append(True)

        left: list[Any] = []
        idents: list[int] = []
        waited: list[bool] = []
        with Guard("raise", engine):
            for work in (leave_open, wait):
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
        left[0][0].close()
        assert waited

    def test_guards_allow_a_socket_by_its_path(
        self, engine: OptInEngine, session: OptInSession, tmp_path: Path
    ) -> None:
        path = str(tmp_path / "socket")
        with socket.socket(socket.AF_UNIX) as server, Guard("raise", engine, allow=[path]):
            server.bind(path)
            server.listen()
            with session.begin():
                session.execute(READ).all()
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(path)

    def test_guards_do_not_take_a_name_for_another_one(
        self, engine: OptInEngine, session: OptInSession
    ) -> None:
        with Guard("raise", engine, allow=["allowed.example"]), session.begin():
            session.execute(READ).all()
            with suppress(OSError):
                socket.getaddrinfo("allowed.example", 9)
            with socket.socket() as client, pytest.raises(WaitingInTransaction):
                client.connect(("localhost", 9))

    def test_guards_do_not_warn_of_what_their_own_warning_does(
        self, engine: OptInEngine, session: OptInSession, caplog: pytest.LogCaptureFixture
    ) -> None:
        def send(record: Any) -> bool:
            time.sleep(0.001)
            return True

        logging.getLogger("fictive_sqlalchemy.transactions").addFilter(send)
        try:
            with Guard("log", engine), session.begin():
                session.execute(READ).all()
                time.sleep(0.001)
        finally:
            logging.getLogger("fictive_sqlalchemy.transactions").removeFilter(send)
        assert len(caplog.records) == 1

    @pytest.mark.parametrize(
        "allow", [5, None, [5], [None], b"x", [""], ["http://pay.example"], ["pay.example:80"]]
    )
    def test_guards_say_what_hosts_are(self, engine: OptInEngine, allow: Any) -> None:
        with pytest.raises(exc.ArgumentError, match="allow is a list of hosts"):
            Guard("raise", engine, allow=allow)

    @pytest.mark.parametrize("allow", ["::1", "[::1]", "10.0.0.1", "PAY.example.", "/run/socket"])
    def test_guards_know_addresses_names_and_paths(self, engine: OptInEngine, allow: str) -> None:
        Guard("raise", engine, allow=[allow])

    def test_waiting_may_be_allowed_in_a_stream_that_ends_in_another_context(self) -> None:
        def parts() -> Iterator[int]:
            with allow_waiting():
                yield 1
                yield 2

        stream: Any = parts()
        copy_context().run(next, stream)
        copy_context().run(stream.close)


class TestCosts:
    def test_a_read_costs_nothing_when_recording_is_off(
        self, engine: OptInEngine, session: OptInSession
    ) -> None:
        def read() -> None:
            session.execute(READ).all()

        for _ in range(10):  # psycopg 3 prepares it
            read()
        before = calls_of(read)
        with record(session), Guard("log", engine), Reporter(engine) as reporter:  # noqa: SIM117
            with reporter.unit("on"):
                read()
        assert calls_of(read) == before

    def test_a_read_costs_few_calls_when_recording_is_on(self, session: OptInSession) -> None:
        def read() -> None:
            session.execute(READ).all()

        for _ in range(10):
            read()
        before = calls_of(read)
        with record(session):
            assert calls_of(read) <= before + 20
