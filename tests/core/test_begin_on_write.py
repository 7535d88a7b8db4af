"""``begin_on_write=True``: outside, the first write begins what ``commit()`` ends. On the wire.

That the same steps come to the same as on a stock session is in
``test_begin_on_write_like_stock.py``; the extension is in ``flask/test_begin_on_write.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc, func, insert, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from fictive_sqlalchemy import CommitOutcomeUnknown, OptInEngine, OptInSession, unit_of_work
from fictive_sqlalchemy.ext.tenacity import retry_transaction
from tests.library import (
    Author,
    Base,
    Document,
    Onlooker,
    Seat,
    Sessions,
    authors,
    backend_pid,
    checked_out,
    sent,
)
from tests.wire import WireProxy

Call = Callable[[OptInSession], Any]


@pytest.fixture
def sessions(engine: OptInEngine) -> Sessions:
    return sessionmaker(engine, class_=OptInSession, begin_on_write=True)


def new(name: str = "new") -> Author:
    return Author(name=name, age=1)


def texts(sql: str) -> Call:
    return lambda session: session.execute(text(sql))


def add_and_flush(session: OptInSession) -> None:
    session.add(new())
    session.flush()


def change_and_read(session: OptInSession) -> None:
    session.get_one(Author, 1).name = "new"
    assert session.scalars(select(Author).filter_by(name="new")).all()


MANY: list[dict[str, Any]] = [{"name": "new"}, {"name": "newer"}]
INSERTED = insert(authors).values(name="new").returning(authors.c.id).cte("inserted")

#: What begins the transaction, and what is sent for it after BEGIN.
WRITES: dict[str, tuple[Call, list[str]]] = {
    "flush": (add_and_flush, ["INSERT"]),
    "insert": (lambda s: s.execute(insert(Author).values(name="new")), ["INSERT"]),
    "update": (lambda s: s.execute(update(Author).values(age=9)), ["UPDATE"]),
    "delete": (lambda s: s.execute(sa.delete(Document)), ["DELETE"]),
    "table": (lambda s: s.execute(insert(authors).values(name="new")), ["INSERT"]),
    "scalar": (
        lambda s: s.scalar(insert(authors).values(name="new").returning(authors.c.id)),
        ["INSERT"],
    ),
    "many rows": (lambda s: s.execute(insert(authors).values(MANY)), ["INSERT"]),
    "objects": (lambda s: s.execute(insert(Author), MANY[:1]), ["INSERT"]),
    "bulk save": (lambda s: s.bulk_save_objects([new()]), ["INSERT"]),
    "bulk insert": (lambda s: s.bulk_insert_mappings(sa.inspect(Author), MANY[:1]), ["INSERT"]),
    "bulk update": (
        lambda s: s.bulk_update_mappings(sa.inspect(Author), [{"id": 1, "age": 9}]),
        ["UPDATE"],
    ),
    "query update": (
        lambda s: s.query(Author).update({"age": 9}, synchronize_session=False),
        ["UPDATE"],
    ),
    "query delete": (
        lambda s: s.query(Document).delete(synchronize_session=False),
        ["DELETE"],
    ),
    "core in a CTE": (lambda s: s.execute(select(INSERTED.c.id)).all(), ["WITH"]),
    "text": (texts("INSERT INTO author (name) VALUES ('new')"), ["INSERT"]),
    "text with a CTE": (
        texts("WITH w AS (UPDATE author SET age = 9 RETURNING id) SELECT id FROM w"),
        ["WITH"],
    ),
    "text into": (texts("SELECT id INTO copied FROM author"), ["SELECT"]),
    "DDL": (texts("CREATE TABLE extra (id int)"), ["CREATE"]),
    "DDL element": (
        lambda s: s.execute(sa.schema.DropTable(Base.metadata.tables["seat"])),
        ["DROP"],
    ),
    "LOCK": (texts("LOCK TABLE author"), ["LOCK"]),
    "SET": (texts("SET LOCAL lock_timeout = '5s'"), ["SET"]),
    "DO": (texts("DO $$ BEGIN UPDATE author SET age = 9; END $$"), ["DO"]),
    "EXPLAIN ANALYZE": (texts("EXPLAIN (ANALYZE) UPDATE author SET age = 9"), ["EXPLAIN"]),
    "two statements": (texts("SELECT 1; DELETE FROM document"), ["SELECT"]),
    "nextval": (lambda s: s.scalar(select(func.nextval("author_id_seq"))), ["SELECT"]),
    "set_config": (lambda s: s.scalar(select(func.set_config("a.b", "c", True))), ["SELECT"]),
    "advisory lock": (lambda s: s.scalar(select(func.pg_advisory_xact_lock(1))), ["SELECT"]),
    "a function": (lambda s: s.scalar(select(func.renew(1))), ["SELECT"]),
    "a function as rows": (texts("SELECT * FROM renew(1)"), ["SELECT"]),
    "a function in quotes": (texts('SELECT "renewAll"(1)'), ["SELECT"]),
    "lock": (lambda s: s.execute(select(Author).with_for_update()).all(), ["SELECT"]),
    "lock by get": (lambda s: s.get(Author, 1, with_for_update=True), ["SELECT"]),
    "lock by query": (lambda s: s.query(Author).with_for_update(read=True).all(), ["SELECT"]),
    "lock by text": (texts("SELECT id FROM author FOR UPDATE"), ["SELECT"]),
    "connection": (lambda s: s.connection().execute(select(authors)).all(), ["SELECT"]),
    "driver": (
        lambda s: s.connection().exec_driver_sql("UPDATE author SET age = 9"),
        ["UPDATE"],
    ),
    "cursor": (
        lambda s: s.connection().connection.cursor().execute("UPDATE author SET age = 9"),
        ["UPDATE"],
    ),
}

_FUNCTIONS = """
CREATE FUNCTION renew(n int) RETURNS int LANGUAGE sql AS $$ UPDATE author SET age = n; SELECT n $$;
CREATE FUNCTION "renewAll"(n int) RETURNS int LANGUAGE sql AS $$ SELECT renew(n) $$;
"""

#: What is not to be seen by anybody else before commit().
_EVERYTHING = """
SELECT (SELECT array_agg(author ORDER BY id)::text FROM author)
    || (SELECT count(*) FROM document) || coalesce(to_regclass('extra')::text, 'none')
    || coalesce(to_regclass('copied')::text, 'none') || coalesce(to_regclass('seat')::text, 'none')
"""


class TestWhatBegins:
    @pytest.fixture(autouse=True)
    def _with_functions(self, engine: OptInEngine, onlooker: Onlooker) -> None:
        onlooker.run(_FUNCTIONS)

    @pytest.mark.parametrize("name", WRITES)
    def test_a_write_begins_and_rollback_undoes_it(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, name: str
    ) -> None:
        write, said = WRITES[name]
        before = onlooker.scalar(_EVERYTHING)
        with wire.record() as recording:
            write(session)
        assert sent(recording) == ["BEGIN", *said]
        assert session.in_transaction()
        assert wire.transactions_open == 1
        if "DROP" not in said and name != "LOCK":  # whose locks the onlooker would wait for
            assert onlooker.scalar(_EVERYTHING) == before
        with wire.record() as recording:
            assert session.scalar(select(1)) == 1
            session.rollback()
        assert sent(recording) == ["SELECT", "ROLLBACK"]
        assert not session.in_transaction()
        assert onlooker.scalar(_EVERYTHING) == before

    @pytest.mark.parametrize("name", WRITES)
    def test_commit_stores_what_a_write_began(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, name: str
    ) -> None:
        write, said = WRITES[name]
        with wire.record() as recording:
            write(session)
            session.commit()
            session.scalar(select(1))
        assert sent(recording) == ["BEGIN", *said, "COMMIT", "SELECT"]
        if "INSERT" in said:
            assert "new" in onlooker.names()

    @pytest.mark.parametrize("name", ["flush", "insert", "text", "lock", "bulk save"])
    def test_close_rolls_back_what_a_write_began(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, name: str
    ) -> None:
        write, said = WRITES[name]
        with wire.record() as recording:
            write(session)
            session.close()
        assert sent(recording) == ["BEGIN", *said, "ROLLBACK"]
        assert onlooker.names() == []

    def test_many_parameter_sets_are_part_of_the_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            session.execute(insert(authors), MANY)
            session.execute(text("UPDATE author SET age = :age"), [{"age": 1}, {"age": 2}])
        assert sent(recording)[0] == "BEGIN"
        assert "COMMIT" not in sent(recording)
        assert onlooker.names() == []
        session.commit()
        assert onlooker.names() == ["new", "newer"]

    def test_refresh_with_for_update_begins(self, session: OptInSession, wire: WireProxy) -> None:
        author = session.get_one(Author, 1)
        with wire.record() as recording:
            session.refresh(author, with_for_update=True)
            assert wire.transactions_open == 1
            session.commit()
        assert sent(recording) == ["BEGIN", "SELECT", "COMMIT"]

    def test_a_lock_keeps_another_session_out(self, sessions: Sessions) -> None:
        with sessions() as session, sessions() as other:
            session.get(Author, 1, with_for_update=True)
            with pytest.raises(exc.OperationalError):
                other.get(Author, 1, with_for_update={"nowait": True})
            other.rollback()
            session.commit()
            assert other.get(Author, 1, with_for_update={"nowait": True})

    def test_reading_stays_outside(self, session: OptInSession, wire: WireProxy) -> None:
        with wire.record() as recording:
            author = session.get_one(Author, 1)
            assert len(author.documents) == 1
            session.execute(text("SELECT count(*) FROM author")).scalar_one()
            session.scalar(select(func.now()))
            assert not session.in_transaction()
            session.query(Author).filter_by(name="Ada").all()
            session.execute(select(Author).execution_options(yield_per=1)).all()
            session.flush()
            assert not session.in_transaction()
            author.name = author.name
            session.flush()
        assert {"BEGIN", "COMMIT", "ROLLBACK"}.isdisjoint(sent(recording))
        assert not session.in_transaction()

    def test_a_read_while_changes_wait_flushes_them(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.add(new())
        with wire.record() as recording:
            assert session.scalars(select(Author).filter_by(name="new")).one()
        assert sent(recording) == ["BEGIN", "INSERT", "SELECT"]
        assert onlooker.names() == []
        session.commit()
        assert onlooker.names() == ["new"]

    @pytest.mark.parametrize("how", ["option", "block"])
    def test_a_read_without_autoflush_is_the_select_alone(
        self, sessions: Sessions, wire: WireProxy, how: str
    ) -> None:
        with sessions(autoflush=how != "option") as session:
            session.add(new())
            with wire.record() as recording:
                if how == "option":
                    session.scalars(select(Author)).all()
                else:
                    with session.no_autoflush:
                        session.scalars(select(Author)).all()
            assert sent(recording) == ["SELECT"]
            assert len(session.new) == 1

    def test_commit_with_nothing_sent_is_one_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.get(Author, 1)
        session.add_all([new(), new("newer")])
        with wire.record() as recording:
            session.commit()
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "COMMIT"
        assert onlooker.names() == ["new", "newer"]

    def test_an_end_where_nothing_was_written_sends_nothing(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            session.commit()
            session.rollback()
            session.flush()
            session.close()
        assert sent(recording) == []

    def test_a_stream_outside_leaves_no_transaction_open(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        stream = session.scalars(select(Author).execution_options(yield_per=1))
        assert next(stream)
        assert wire.transactions_open == 0
        stream.close()

    def test_a_stream_that_locks_begins(self, session: OptInSession, wire: WireProxy) -> None:
        select_ = select(Author).with_for_update().execution_options(yield_per=1)
        with wire.record() as recording:
            stream = session.scalars(select_)
            assert next(stream)
            assert wire.transactions_open == 1
            stream.close()
            session.commit()
        assert (sent(recording)[0], sent(recording)[-1]) == ("BEGIN", "COMMIT")

    def test_listeners_to_after_begin_come_before_the_write(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        @event.listens_for(session, "after_begin")
        def set_tenant(session: Session, transaction: Any, connection: sa.Connection) -> None:
            connection.execute(text("SET LOCAL app.tenant TO 'acme'"))

        with wire.record() as recording:
            session.execute(text("UPDATE author SET name = current_setting('app.tenant') || id"))
            session.rollback()
        assert sent(recording) == ["BEGIN", "SET", "UPDATE", "ROLLBACK"]


class TestSavepoints:
    def test_the_transaction_stays_open_after_a_savepoint_block_outside(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.add(new("before"))
        with wire.record() as recording, session.begin_nested():
            session.add(new())
        assert sent(recording) == ["BEGIN", "INSERT", "SAVEPOINT", "INSERT", "RELEASE"]
        assert wire.transactions_open == 1
        assert onlooker.names() == []
        session.commit()
        assert onlooker.names() == ["before", "new"]

    def test_a_write_before_a_savepoint_is_kept_when_its_block_fails(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.execute(insert(authors).values(name="before"))
        with wire.record() as recording, suppress(exc.IntegrityError), session.begin_nested():
            session.add(new("Ada"))
        assert sent(recording) == ["SAVEPOINT", "INSERT", "ROLLBACK TO"]
        session.add(new("after"))
        session.commit()
        assert onlooker.names() == ["after", "before"]

    def test_rollback_after_a_savepoint_block_undoes_the_block(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.begin_nested():
            session.add(new())
        session.rollback()
        assert onlooker.names() == []

    def test_begin_nested_inside_a_block_is_a_savepoint(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording, session.begin():
            session.execute(update(Author).values(age=9))
            with session.begin_nested():
                session.execute(update(Author).values(age=8))
        assert sent(recording) == ["BEGIN", "UPDATE", "SAVEPOINT", "UPDATE", "RELEASE", "COMMIT"]


class TestErrors:
    def test_a_failed_flush_needs_rollback_as_on_stock(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.execute(insert(authors).values(name="new"))
        session.add(new("Ada"))
        with wire.record() as recording, pytest.raises(exc.IntegrityError):
            session.flush()
        assert sent(recording) == ["INSERT", "ROLLBACK"]
        with pytest.raises(exc.PendingRollbackError):
            session.get(Author, 2)
        session.rollback()
        assert session.get(Author, 2)
        assert onlooker.names() == []

    def test_a_failed_commit_needs_rollback_as_on_stock(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.add(new("Ada"))
        with pytest.raises(exc.IntegrityError):
            session.commit()
        with pytest.raises(exc.PendingRollbackError):  # or it would be stored without the other
            session.execute(insert(authors).values(name="new"))
        with pytest.raises(exc.PendingRollbackError):
            session.commit()
        session.rollback()
        assert onlooker.names() == []
        session.add(new())
        session.commit()
        assert onlooker.names() == ["new"]

    def test_a_failed_statement_aborts_the_transaction(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.execute(insert(authors).values(name="new"))
        with pytest.raises(exc.IntegrityError):
            session.execute(insert(authors).values(name="Ada"))
        with pytest.raises(exc.DBAPIError, match="current transaction is aborted"):
            session.scalar(select(1))
        with pytest.raises(exc.PendingRollbackError) as caught:  # stock loses it without a word
            session.commit()
        assert isinstance(caught.value.__cause__, exc.IntegrityError)
        session.rollback()
        assert session.scalar(select(1)) == 1
        assert onlooker.names() == []

    def test_a_failed_read_before_the_first_write_aborts_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(exc.DBAPIError):
            session.scalar(text("SELECT nothing FROM nowhere"))
        session.add(new())
        session.commit()
        assert onlooker.names() == ["new"]

    def test_a_constraint_checked_at_commit_stores_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.execute(insert(authors).values(name="new"))
        session.add_all([Seat(place=1), Seat(place=1)])
        session.flush()
        with pytest.raises(exc.IntegrityError):
            session.commit()
        session.rollback()
        assert onlooker.names() == []
        assert not session.scalars(select(Seat)).all()

    def test_a_server_process_that_is_killed_undoes_all(
        self, sessions: Sessions, onlooker: Onlooker, wire: WireProxy
    ) -> None:
        with sessions() as session:
            session.execute(insert(authors).values(name="new"))
            pid = backend_pid(session.connection())
            onlooker.kill(pid)
            with pytest.raises(exc.DBAPIError):
                session.execute(insert(authors).values(name="newer"))
            session.rollback()
            session.execute(insert(authors).values(name="newest"))
            session.commit()
        assert onlooker.names() == ["newest"]

    def test_a_connection_that_was_lost_while_idle_is_replaced(
        self, session: OptInSession, onlooker: Onlooker, wire: WireProxy
    ) -> None:
        pid: Any = session.scalar(select(func.pg_backend_pid()))
        onlooker.kill(pid)
        while pid in wire.pids:  # until the client can know
            pass
        session.add(new())
        session.commit()
        assert onlooker.names() == ["new"]

    @pytest.mark.parametrize("where", ["before", "after"])
    def test_a_connection_lost_during_commit_is_an_unknown_outcome(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, where: Any
    ) -> None:
        session.execute(insert(authors).values(name="new"))
        wire.cut_where = lambda message: where if message.verb == "COMMIT" else None
        with pytest.raises(CommitOutcomeUnknown):
            session.commit()
        wire.cut_where = None
        session.rollback()
        assert onlooker.names() == (["new"] if where == "after" else [])
        session.execute(insert(authors).values(name="newer"))
        session.commit()
        assert "newer" in onlooker.names()

    def test_two_threads_have_a_transaction_each(
        self, sessions: Sessions, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        written = threading.Barrier(2, timeout=30)

        def write(name: str, commits: bool) -> None:
            with sessions() as session:
                session.add(new(name))
                session.flush()
                written.wait()  # both have a transaction open now
                if commits:
                    session.commit()

        threads = [
            threading.Thread(target=write, args=arguments)
            for arguments in (("first", True), ("second", False))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert onlooker.names() == ["first"]
        assert checked_out(engine) == 0


def begin_write(session: OptInSession) -> None:
    session.execute(update(Author).values(age=9))


def do_nothing(session: OptInSession | None = None) -> None:
    pass


BEGINNINGS: dict[str, Call] = {
    "begin": lambda session: session.begin(),
    "atomic": lambda session: session.atomic().__enter__(),
    "unit of work": lambda session: unit_of_work(lambda: session).__enter__(),
    "unit of work of a session": lambda session: unit_of_work(Session)(do_nothing)(session=session),
    "retry": lambda session: retry_transaction(session)(do_nothing)(),
}


class TestBegin:
    @pytest.mark.parametrize("name", BEGINNINGS)
    def test_begin_after_a_write_says_what_began(self, session: OptInSession, name: str) -> None:
        begin_write(session)
        line = begin_write.__code__.co_firstlineno + 1
        where = rf"execute\(\) in {__file__}, line {line}, in begin_write,.* Call commit\(\)"
        with pytest.raises(exc.InvalidRequestError, match=where):
            BEGINNINGS[name](session)
        session.commit()

    @pytest.mark.parametrize(
        ("call", "said"),
        [
            (lambda session: session.flush(), "flush"),
            (lambda session: session.query(Author).count(), "count"),
            (lambda session: list(session.query(Author)), "execute"),
            (lambda session: session.scalars(select(Author)), "scalars"),
            (lambda session: session.begin_nested(), "begin_nested"),
            (lambda session: session.connection(), "connection"),
            (lambda session: session.bulk_save_objects([new("newer")]), "bulk_save_objects"),
        ],
    )
    def test_the_error_names_the_call(self, session: OptInSession, call: Call, said: str) -> None:
        session.add(new())
        call(session)
        with pytest.raises(exc.InvalidRequestError, match=rf"begun by {said}\(\) in "):
            session.begin()

    def test_begin_works_after_reads_and_after_the_end_of_a_transaction(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        session.get(Author, 1)
        with session.begin():
            begin_write(session)
        begin_write(session)
        session.commit()
        with wire.record() as recording, session.begin():
            begin_write(session)
        assert sent(recording) == ["BEGIN", "UPDATE", "COMMIT"]

    def test_commit_inside_a_block_ends_its_transaction(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.add(new())
            session.commit()
            with pytest.raises(exc.InvalidRequestError, match="closed transaction"):
                session.scalar(select(1))
        assert onlooker.names() == ["new"]

    def test_unit_of_work_is_a_transaction_of_its_own(
        self, sessions: Sessions, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, unit_of_work(sessions) as session:
            session.execute(insert(authors).values(name="new"))
            with pytest.raises(exc.InvalidRequestError, match="commits at its end"):
                session.commit()
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        assert onlooker.names() == ["new"]

    def test_functions_that_retry_work(self, sessions: Sessions, onlooker: Onlooker) -> None:
        @retry_transaction(sessions)
        def store(session: OptInSession) -> None:
            session.add(new())

        store()
        assert onlooker.names() == ["new"]

    def test_on_commit_waits_for_the_commit(self, session: OptInSession) -> None:
        called: list[str] = []
        begin_write(session)
        session.on_commit(lambda: called.append("commit"))
        session.on_rollback(lambda: called.append("rollback"))
        assert called == []
        session.commit()
        assert called == ["commit"]

    @pytest.mark.parametrize("value", [1, "yes", None])
    def test_the_option_is_a_bool(self, engine: OptInEngine, value: Any) -> None:
        with pytest.raises(exc.ArgumentError, match="begin_on_write is True or False"):
            OptInSession(engine, begin_on_write=value)

    def test_the_option_contradicts_autobegin(self, engine: OptInEngine) -> None:
        with pytest.raises(exc.ArgumentError, match="autobegin=False"):
            OptInSession(engine, begin_on_write=True, autobegin=False)

    def test_one_session_may_differ_from_its_factory(
        self, sessions: Sessions, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with sessions(begin_on_write=False) as session, wire.record() as recording:
            session.execute(insert(authors).values(name="new"))
        assert sent(recording) == ["INSERT"]
        assert onlooker.names() == ["new"]
