"""A new object is stored by the session of the caller."""

# mypy: disable-error-code="misc"

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import (
    object_session,
    sessionmaker,
)

from fictive_sqlalchemy import IsolationLevel, OptInSession, create_engine
from fictive_sqlalchemy._core.engine import OptInEngine
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from tests.find_or_create.models import (
    Ask,
    Audit,
    Author,
    Base,
    Doc,
    Novel,
    Rows,
    Slot,
    anywhere,
    both,
    listening,
)
from tests.wire import WireProxy


def test_the_schema_of_the_tenant_holds_for_the_search_and_for_the_new_row(
    session: OptInSession, ask: Ask, rows: Rows
) -> None:
    session.connection(execution_options={"schema_translate_map": {None: "acme"}})
    with listening(Doc, "before_insert", lambda *args: None):
        doc, created = ask(Doc, title="menu")
    assert created
    assert ask(Doc, title="menu") == (doc, False)
    doc.note = "changed"
    session.commit()
    assert rows("SELECT title, note FROM acme.docs") == [("menu", "changed")]
    assert rows("SELECT title FROM public.docs") == []


@both
@pytest.mark.parametrize("fails", [False, True])
def test_after_insert_may_register_what_is_called_after_commit(
    session: OptInSession, ask: Ask, rows: Rows, where: str, fails: bool
) -> None:
    called: list[Any] = []

    def after_insert(mapper: Any, connection: Any, target: Doc) -> None:
        session.on_commit(lambda: called.append(rows("SELECT title FROM docs")))
        session.on_rollback(lambda: called.append("rolled back"))
        if fails:
            connection.execute(sa.text("SELECT 1/0"))

    with (
        listening(Doc, "after_insert", after_insert),
        pytest.raises(exc.DataError) if fails else nullcontext(),
        anywhere(session, where),
    ):
        ask(Doc, title="menu")
        if where == "inside":
            assert called == []
    assert called == (["rolled back"] if fails else [["menu"]])


@pytest.mark.parametrize("name", ["before_insert", "before_flush", "after_flush", "after_begin"])
def test_listeners_see_the_session_that_called(
    session: OptInSession, ask: Ask, wire: WireProxy, name: str
) -> None:
    session.info["tenant"] = 7
    seen: list[Any] = []

    def listen(*args: Any) -> None:
        of: Any = object_session(args[2]) if name == "before_insert" else args[0]
        seen.append((of is session, of.info, of.in_transaction()))

    target = Doc if name == "before_insert" else session
    with listening(target, name, listen), wire.record() as recording:
        assert ask(Doc, title="menu")[1]
    assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    assert seen == [(True, {"tenant": 7}, True)]


@pytest.mark.parametrize("name", ["before_flush", "after_flush"])
@pytest.mark.parametrize("times", [1, 2])
def test_what_a_listener_adds_is_stored_with_the_new_object(
    session: OptInSession,
    ask: Ask,
    wire: WireProxy,
    rows: Rows,
    name: str,
    times: int,
) -> None:
    waiting = Doc(title="waiting")
    session.add(waiting)

    def listen(session: OptInSession, *args: Any) -> None:
        if len(audits) < times:
            audits.append(Audit(what=str(len(audits))))
            session.add(audits[-1])

    audits: list[Audit] = []
    with listening(session, name, listen), wire.record() as recording:
        doc, created = ask(Doc, title="menu")
    assert created
    assert recording.verbs[:2] == ["SELECT", "BEGIN"]
    assert recording.verbs.count("COMMIT") == 1
    assert rows("SELECT title FROM docs") == ["menu"]
    assert rows("SELECT what FROM audits") == ["0", "1"][: 1 if name == "before_flush" else times]
    assert list(session.new) == [waiting]
    assert doc in session


def test_a_listener_that_adds_for_ever_is_an_error_and_nothing_is_stored(
    session: OptInSession, ask: Ask, rows: Rows
) -> None:
    with (
        listening(session, "after_flush", lambda session, _: session.add(Audit(what="again"))),
        pytest.raises(exc.SQLAlchemyError, match="100 times"),
    ):
        ask(Doc, title="menu")
    assert (list(session), rows("SELECT what FROM audits")) == ([], [])
    assert not session.in_transaction()


def test_what_a_listener_takes_out_is_not_stored_and_nothing_else_is(
    session: OptInSession, ask: Ask, rows: Rows
) -> None:
    waiting = Doc(title="waiting")
    session.add(waiting)

    def expunge(session: OptInSession, context: Any, instances: Any) -> None:
        for instance in session.new:
            if instance is not waiting:
                session.expunge(instance)

    with listening(session, "before_flush", expunge):
        ask(Doc, title="menu")
    assert (list(session.new), rows("SELECT title FROM docs")) == ([waiting], [])


def test_settings_of_after_begin_hold_for_the_insert(
    session: OptInSession, ask: Ask, rows: Rows
) -> None:
    rows(
        "ALTER TABLE docs ENABLE ROW LEVEL SECURITY; ALTER TABLE docs FORCE ROW LEVEL SECURITY;"
        "CREATE ROLE fboc_tenant; GRANT USAGE ON SCHEMA public TO fboc_tenant;"
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO fboc_tenant;"
        "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO fboc_tenant;"
        "CREATE POLICY one ON docs USING (true) "
        "WITH CHECK (note = current_setting('app.tenant', true))"
    )

    def begin(session: OptInSession, transaction: Any, connection: Any) -> None:
        connection.execute(sa.text("SET LOCAL ROLE fboc_tenant"))
        connection.execute(sa.text("SET LOCAL app.tenant = 'acme'"))

    try:
        with listening(session, "after_begin", begin):
            assert ask(Doc, {"note": "acme"}, title="menu")[1]
            with pytest.raises(exc.ProgrammingError, match="row-level security"):
                ask(Doc, {"note": "other"}, title="other")
    finally:
        rows("DROP OWNED BY fboc_tenant; DROP ROLE fboc_tenant")


def test_listeners_that_read_need_one_connection_for_each_thread(url: str, tables: None) -> None:
    engine = create_engine(url, pool_size=2, max_overflow=0, pool_timeout=5)
    maker = sessionmaker(engine, class_=OptInSession)
    together = threading.Barrier(4)

    def before_insert(mapper: Any, connection: Any, target: Any) -> None:
        session = object_session(target)
        assert session is not None
        session.scalar(sa.select(sa.func.pg_sleep(0.05)))

    def work(number: int) -> bool:
        with maker() as session:
            together.wait()
            return filter_by_or_create(session, Doc, {"title": f"{number}"}, {})[1]

    with listening(Doc, "before_insert", before_insert), ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [True] * 4
    engine.dispose()


def test_a_stream_under_way_and_a_connection_handed_out_stay(
    session: OptInSession, ask: Ask, wire: WireProxy, rows: Rows
) -> None:
    numbers = session.execute(
        sa.text("SELECT generate_series(1, 5)").execution_options(yield_per=2)
    ).scalars()
    assert next(numbers) == 1
    handed_out = session.connection()
    assert ask(Doc, title="menu")[1]
    assert list(numbers) == [2, 3, 4, 5]
    assert not handed_out.in_transaction()
    assert rows("SELECT title FROM docs") == ["menu"]


def test_the_caller_holds_a_single_connection(maker: Any, engine: OptInEngine, ask: Ask) -> None:
    held: list[Any] = []
    with listening(Doc, "after_insert", lambda *args: held.append(engine.pool.status())):
        ask(Doc, title="menu")
    assert "Connections: 1 " in held[0] or "in pool: 0 " in held[0]
    pool: Any = engine.pool
    assert pool.checkedout() <= 1


@pytest.mark.parametrize("is_read_first", [False, True])
def test_begin_on_write_begins_the_transaction_and_leaves_it_open(
    maker: Any, wire: WireProxy, rows: Rows, is_read_first: bool
) -> None:
    with maker(begin_on_write=True) as session:
        if is_read_first:
            session.scalar(sa.select(1))
        with wire.record() as recording:
            doc, created = filter_by_or_create(session, Doc, {"title": "menu"}, {})
            assert created
            assert filter_by_or_create(session, Doc, {"title": "menu"}, {}) == (doc, False)
        assert recording.verbs == ["SELECT", "BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "SELECT"]
        assert (session.in_transaction(), rows("SELECT title FROM docs")) == (True, [])
        session.commit()
    assert rows("SELECT title FROM docs") == ["menu"]


def test_read_only_outside_lets_a_new_object_be_stored(url: str, rows: Rows) -> None:
    engine = create_engine(url, read_only_outside=True)
    with OptInSession(engine) as session:
        assert filter_by_or_create(session, Doc, {"title": "menu"}, {})[1]
    assert rows("SELECT title FROM docs") == ["menu"]
    engine.dispose()


def test_a_session_with_shards_is_asked_with_the_object(engine: OptInEngine, rows: Rows) -> None:
    class Sharded(OptInSession, ShardedSession):  # pyright: ignore[reportIncompatibleVariableOverride]
        pass

    def choose(mapper: Any, instance: Any, clause: Any = None) -> str:
        return f"one{instance.title[:0]}"

    session = Sharded(
        shards={"one": engine},
        shard_chooser=choose,
        identity_chooser=lambda *args, **kwargs: ["one"],
        execute_chooser=lambda context: ["one"],
    )
    with session:
        doc, created = filter_by_or_create(session, Doc, {"title": "menu"}, {})
        assert created
        assert filter_by_or_create(session, Doc, {"title": "menu"}, {}) == (doc, False)
        assert not session.in_transaction()
    assert rows("SELECT title FROM docs") == ["menu"]


def test_get_bind_is_asked_with_a_mapper(engine: OptInEngine, rows: Rows) -> None:
    asked: list[Any] = []

    class Routing(OptInSession):
        def get_bind(self, mapper: Any = None, **kwargs: Any) -> Any:
            asked.append(mapper.class_)
            return engine

    with Routing() as session:
        assert filter_by_or_create(session, Doc, {"title": "menu"}, {})[1]
        with pytest.raises(exc.InvalidRequestError, match="not stored yet"):
            filter_by_or_create(session, Novel, {"title": "One"}, {"author": Author(name="new")})
    assert set(asked) == {Doc, Novel}
    assert rows("SELECT title FROM docs") == ["menu"]


def test_a_bind_of_sqlite_beside_ours_is_left_alone(
    session: OptInSession, ask: Ask, engine: OptInEngine, rows: Rows
) -> None:
    sqlite = sa.create_engine("sqlite://")
    Base.metadata.create_all(sqlite, [Base.metadata.tables["audits"]])
    session.bind = None
    session.bind_mapper(Audit, sqlite)
    session.bind_mapper(Doc, engine)
    assert ask(Doc, title="menu")[1]
    assert not session.in_transaction()
    audit, created = ask(Audit, what="local")
    assert (created, session.in_transaction()) == (True, True)
    assert ask(Doc, title="other")[1]
    assert ask(Audit, what="local") == (audit, False)
    session.commit()
    assert sorted(rows("SELECT title FROM docs")) == ["menu", "other"]
    session.close()
    sqlite.dispose()


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_row_that_the_snapshot_does_not_show_is_found_out_with_the_insert_of_the_flush(
    session: OptInSession, ask: Ask, rows: Rows, level: IsolationLevel
) -> None:
    with session.begin(isolation_level=level) as transaction:
        session.scalar(sa.select(sa.func.count()).select_from(Slot))
        rows("INSERT INTO slots (name) VALUES ('a')")
        with pytest.raises(exc.DBAPIError) as raised:
            ask(Slot, name="a")  # a column default reads another column
        transaction.rollback()
    orig: Any = raised.value.orig
    assert (getattr(orig, "sqlstate", None) or orig.pgcode) == "40001"
    rows("INSERT INTO docs (title) VALUES ('menu')")
    with pytest.raises(exc.IntegrityError), session.begin(isolation_level=level):
        ask(Doc, {"title": "menu"}, note="other")
