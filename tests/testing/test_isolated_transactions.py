"""Transactions, errors and constraints work under ``isolate()`` as they do without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy.testing import isolate
from tests.library import Author, Onlooker, Seat, authors, opened
from tests.testing.support import add_author, names, run, scalar
from tests.wire import WireProxy


class TestWhatIsSent:
    def test_one_begin_and_one_rollback_are_sent(self, wire: WireProxy, wire_url: str) -> None:
        with opened(wire_url) as engine:
            pid = scalar(engine, "SELECT pg_backend_pid()")
            with wire.record() as recording, isolate(engine):
                add_author(engine, "Eve")
                with OptInSession(engine) as session:
                    session.add(Author(name="Fay"))
                    session.commit()
                    with pytest.raises(exc.IntegrityError), session.begin():
                        session.add(Author(name="Ada"))
                assert names(engine) == ["Eve", "Fay"]
                assert scalar(engine, "SELECT pg_backend_pid()") == pid
            assert recording.verbs[:2] == ["SHOW", "BEGIN"]
            assert recording.verbs[-1] == "ROLLBACK"
            assert {"COMMIT", "BEGIN", "ROLLBACK"}.isdisjoint(recording.verbs[2:-1])
            assert len({message.connection for message in recording.messages}) == 1
            assert wire.transactions_open == 0
            assert scalar(engine, "SELECT pg_backend_pid()") == pid
            assert names(engine) == []

    def test_a_statement_outside_is_a_savepoint(self, wire: WireProxy, wire_url: str) -> None:
        with opened(wire_url) as engine, isolate(engine), engine.connect() as connection:
            with wire.record() as recording:
                connection.execute(sa.select(authors)).all()
            assert recording.verbs == ["SAVEPOINT", "SELECT", "SELECT", "SET", "SET", "RELEASE"]
            # The one constraint that is deferrable
            assert recording.statements[3] == "SET CONSTRAINTS public.seat_place_key IMMEDIATE"
            assert recording.statements[4] == "SET CONSTRAINTS public.seat_place_key DEFERRED"

    def test_an_onlooker_sees_nothing_of_what_is_isolated(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with isolate(engine):
            add_author(engine, "Eve")
            assert onlooker.names() == []
        assert onlooker.names() == []

    def test_an_exception_in_the_isolation_undoes_it(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with suppress(KeyboardInterrupt), isolate(engine):
            add_author(engine, "Eve")
            raise KeyboardInterrupt
        assert onlooker.names() == names(engine) == []


class TestErrors:
    def test_an_error_in_a_block_undoes_that_block_alone(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as session:
            session.add(Author(name="before"))
            session.commit()
            with pytest.raises(exc.IntegrityError), session.begin():
                session.add_all([Author(name="in it"), Author(name="Ada")])
            assert names(engine) == ["before"]
            with session.begin():
                session.add(Author(name="after"))
            assert names(engine) == ["before", "after"]

    def test_an_error_outside_undoes_that_statement_alone(self, engine: OptInEngine) -> None:
        with isolate(engine), engine.connect() as connection:
            connection.execute(sa.insert(authors).values(name="before"))
            with pytest.raises(exc.IntegrityError):
                connection.execute(sa.insert(authors).values(name="Ada"))
            assert names(engine) == ["before"]

    def test_errors_of_what_is_no_part_of_a_transaction_are_postgresqls(
        self, engine: OptInEngine
    ) -> None:
        with isolate(engine), engine.connect() as connection:
            add_author(engine, "Eve")
            with pytest.raises(exc.DBAPIError, match="VACUUM cannot run inside a transaction"):
                connection.execute(sa.text("VACUUM author"))
            with pytest.raises(exc.DBAPIError, match="invalid transaction termination"):
                connection.execute(sa.text("DO $$ BEGIN COMMIT; END $$"))
            assert names(engine) == ["Eve"]

    @pytest.mark.parametrize("sql", ["SAVEPOINT mine", "RELEASE mine", "ROLLBACK TO mine"])
    def test_errors_of_a_savepoint_outside_are_as_in_production(
        self, engine: OptInEngine, sql: str
    ) -> None:
        with engine.connect() as connection:
            with pytest.raises(exc.DBAPIError, match="only be used in transaction") as for_real:
                connection.execute(sa.text(sql))
            with isolate_anew(connection, engine):
                with pytest.raises(exc.DBAPIError, match="only be used in transaction") as isolated:
                    connection.execute(sa.text(sql))
                assert type(isolated.value.orig) is type(for_real.value.orig)


@contextmanager
def isolate_anew(connection: sa.Connection, engine: sa.Engine) -> Iterator[None]:
    """Isolate, though a connection of the engine has been used before."""
    connection.invalidate()
    with isolate(engine):
        yield
        connection.invalidate()


class TestDeferredConstraints:
    def test_deferred_constraints_are_checked_at_the_commit(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as session:
            with session.begin():
                session.add_all([Seat(place=1), Seat(place=2)])
            with session.begin():
                session.execute(sa.text("UPDATE seat SET place = 2 WHERE place = 1"))
                session.execute(sa.text("UPDATE seat SET place = 1 WHERE id = 2"))
            with pytest.raises(exc.IntegrityError, match="seat_place_key"), session.begin():
                session.execute(sa.text("UPDATE seat SET place = 3"))
            with pytest.raises(exc.IntegrityError, match="seat_place_key"):
                session.execute(sa.text("UPDATE seat SET place = 3"))
            places = session.scalars(sa.text("SELECT place FROM seat ORDER BY id")).all()
            assert places == [2, 1]

    def test_constraints_of_a_new_table_are_deferred_at_once(self, engine: OptInEngine) -> None:
        with isolate(engine):
            add_author(engine, "Eve")
            with engine.begin() as connection:
                connection.execute(
                    sa.text("CREATE TABLE t (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
                )
                connection.execute(sa.text("INSERT INTO t VALUES (1), (1)"))
                connection.execute(sa.text("DELETE FROM t"))

    def test_deferred_constraints_are_as_declared_in_the_next_transaction(
        self, engine: OptInEngine
    ) -> None:
        with isolate(engine):
            run(engine, "CREATE TABLE t (id int UNIQUE DEFERRABLE INITIALLY IMMEDIATE)")
            with engine.begin() as connection:
                connection.execute(sa.text("SET CONSTRAINTS ALL DEFERRED"))
                connection.execute(sa.text("INSERT INTO t VALUES (1), (1)"))
                connection.execute(sa.text("DELETE FROM t"))
            with engine.begin() as connection:
                with pytest.raises(exc.IntegrityError), connection.begin_nested():
                    connection.execute(sa.text("INSERT INTO t VALUES (1), (1)"))
                connection.execute(sa.text("SET CONSTRAINTS ALL IMMEDIATE"))
            with engine.begin() as connection:
                connection.execute(sa.text("INSERT INTO seat (place) VALUES (1), (1)"))
                connection.execute(sa.text("DELETE FROM seat"))

    def test_deferred_triggers_fire_once_for_each_commit(self, engine: OptInEngine) -> None:
        with isolate(engine):
            run(engine, "CREATE TABLE log (text text)")
            run(
                engine,
                "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN INSERT INTO log VALUES (NEW.name); RETURN NULL; END $$",
            )
            run(
                engine,
                "CREATE CONSTRAINT TRIGGER t AFTER INSERT ON author DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION note()",
            )
            with engine.begin() as connection:
                for name in ("Eve", "Fay"):
                    connection.execute(sa.insert(authors).values(name=name))
                assert connection.scalar(sa.text("SELECT count(*) FROM log")) == 0
            add_author(engine, "Gus")
            with engine.connect() as connection:
                logged = connection.scalars(sa.text("SELECT text FROM log")).all()
            assert logged == ["Eve", "Fay", "Gus"]

    def test_a_deferred_constraint_may_have_the_name_of_one_that_is_not(
        self, engine: OptInEngine
    ) -> None:
        with isolate(engine):
            run(engine, "CREATE TABLE one (id int CONSTRAINT same REFERENCES author)")
            run(
                engine,
                "CREATE TABLE two (id int CONSTRAINT same REFERENCES author "
                "DEFERRABLE INITIALLY DEFERRED)",
            )
            with pytest.raises(exc.IntegrityError):
                run(engine, "INSERT INTO two VALUES (99)")
            run(engine, "INSERT INTO two VALUES (1)")


class TestSeveralTransactions:
    def test_several_transactions_may_read_at_the_same_time(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as one, OptInSession(engine) as two:
            one.begin()
            assert one.get(Author, 1)
            two.begin()
            assert two.get(Author, 2)
            one.add(Author(name="one"))
            one.commit()
            two.add(Author(name="two"))
            two.rollback()
            assert names(engine) == ["one"]

    def test_a_transaction_that_would_see_anothers_changes_is_refused(
        self, engine: OptInEngine
    ) -> None:
        with isolate(engine), OptInSession(engine) as one, OptInSession(engine) as two:
            with one.begin():
                one.add(Author(name="one"))
                one.flush()
                with pytest.raises(exc.InvalidRequestError, match="commit that transaction"):
                    two.get(Author, 1)
                with pytest.raises(exc.InvalidRequestError, match="commit that transaction"):
                    names(engine)
            assert two.get(Author, 1)
            assert names(engine) == ["one"]

    def test_what_the_rollback_of_another_would_take_along_is_refused(
        self, engine: OptInEngine
    ) -> None:
        with isolate(engine), OptInSession(engine) as one, OptInSession(engine) as two:
            with one.begin():
                one.get(Author, 1, with_for_update=True)
                with pytest.raises(exc.InvalidRequestError, match="commit that transaction"):
                    two.execute(sa.insert(authors).values(name="audit"))
            assert names(engine) == []

    @pytest.mark.parametrize(
        "sql",
        ["SET LOCAL lock_timeout = 9", "SAVEPOINT mine", "SELECT set_config('my.one', '1', true)"],
    )
    def test_a_transaction_that_has_set_something_is_not_interrupted(
        self, engine: OptInEngine, sql: str
    ) -> None:
        with isolate(engine), engine.begin() as connection:
            connection.execute(sa.text(sql))
            with pytest.raises(exc.InvalidRequestError, match="commit that transaction"):
                names(engine)

    def test_a_transaction_that_has_failed_is_in_nobodys_way(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as one:
            one.begin()
            one.execute(sa.insert(authors).values(name="undone"))
            with pytest.raises(exc.ProgrammingError):
                one.execute(sa.text("SELECT nothing"))
            add_author(engine, "Eve")
            with pytest.raises(exc.DBAPIError, match="current transaction is aborted") as error:
                one.execute(sa.select(authors))
            assert type(error.value.orig).__name__ == "InFailedSqlTransaction"
            with pytest.raises(exc.PendingRollbackError, match="Nothing of this block was stored"):
                one.commit()
            one.rollback()
            assert names(engine) == ["Eve"]
            one.add(Author(name="Fay"))
            one.commit()
            assert names(engine) == ["Eve", "Fay"]

    def test_reading_a_stream_goes_on_in_anothers_transaction(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as one, OptInSession(engine) as two:
            statement = sa.select(Author).order_by(Author.id).execution_options(yield_per=1)
            with two.begin():
                for author in one.scalars(statement):
                    two.add(Author(name=f"after {author.name}"))
                    two.flush()
            assert names(engine) == ["after Ada", "after Bob", "after Cid"]

    def test_savepoints_in_a_read_only_transaction_stay_read_only(
        self, engine: OptInEngine
    ) -> None:
        with isolate(engine), OptInSession(engine) as session:
            with session.begin(read_only=True):
                names(engine)  # it is parked meanwhile
                for _ in range(2):
                    refused = pytest.raises(exc.DBAPIError, match="read-only transaction")
                    with refused, session.begin_nested():
                        session.execute(sa.text("DELETE FROM document"))
            session.execute(sa.text("DELETE FROM document"))


class TestTransactionControl:
    @pytest.mark.parametrize(
        "sql",
        [
            "COMMIT",
            "  /* so */ -- or\n commit work",
            "BEGIN",
            "START TRANSACTION",
            "END",
            "ABORT",
            "ROLLBACK",
            "ROLLBACK WORK",
            "COMMIT AND CHAIN",
            "PREPARE TRANSACTION 'x'",
            "SELECT 1; COMMIT",
            "SELECT ';', $$;$$, E'\\';' ; /* ; */ COMMIT; SELECT 1",
            'SELECT 1 AS "a;b"; ROLLBACK;',
        ],
    )
    def test_transaction_control_as_a_statement_is_refused(
        self, engine: OptInEngine, sql: str
    ) -> None:
        with isolate(engine):
            with engine.begin() as connection:
                connection.execute(sa.insert(authors).values(name="Eve"))
                with pytest.raises(exc.InvalidRequestError, match=r"use begin\(\), commit"):
                    connection.exec_driver_sql(sql)
            refused = pytest.raises(exc.InvalidRequestError, match=r"use begin\(\), commit")
            with engine.connect() as connection, refused:
                connection.exec_driver_sql(sql)
            assert names(engine) == ["Eve"]
        assert names(engine) == []

    @pytest.mark.parametrize(
        "sql",
        [
            "SELECT 'COMMIT; COMMIT'",
            "SELECT 1 /* ; COMMIT */",
            "DO $$ BEGIN PERFORM 1; END $$",
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END",
            "PREPARE mine AS SELECT 1",
            'CREATE TABLE "begin" (id int); INSERT INTO "begin" VALUES (1)',
            "",
        ],
    )
    def test_what_only_looks_like_transaction_control_is_not_refused(
        self, engine: OptInEngine, sql: str
    ) -> None:
        with isolate(engine), engine.begin() as connection, suppress(exc.ProgrammingError):
            connection.exec_driver_sql(sql)  # psycopg2 does not like an empty one

    def test_transaction_control_that_gets_past_is_noticed(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        isolation = isolate(engine)
        isolation.__enter__()
        add_author(engine, "Eve")
        raw = engine.raw_connection()
        dbapi: Any = raw.dbapi_connection
        dbapi.isolation.physical.commit()
        for _ in range(2):
            with pytest.raises(exc.InvalidRequestError, match="leave COMMIT and ROLLBACK"):
                raw.cursor().execute("SELECT 1")
        raw.close()
        with pytest.raises(exc.InvalidRequestError, match="was ended in it"):
            isolation.__exit__(None, None, None)
        assert onlooker.names() == ["Eve"]

    def test_a_two_phase_transaction_is_refused(self, engine: OptInEngine) -> None:
        with isolate(engine), engine.connect() as connection:
            with pytest.raises(exc.InvalidRequestError, match="can't be isolated"):
                connection.begin_twophase().__enter__()
            connection.invalidate()
