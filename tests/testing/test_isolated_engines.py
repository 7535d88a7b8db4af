"""``isolate()`` takes stock engines and isolated ones, and refuses what it can not isolate."""

from __future__ import annotations

import os
import warnings

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.orm import Session

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy.testing import isolate
from tests.library import Author, authors, checked_out
from tests.testing.support import add_author, names


class TestStockEngines:
    def test_an_open_read_of_a_stock_engine_is_in_nobodys_way(self, stock: sa.Engine) -> None:
        with isolate(stock):
            reader = Session(stock)
            assert reader.get(Author, 1)
            with Session(stock) as writer:
                writer.add(Author(name="Eve"))
                writer.commit()
            reader.rollback()
            reader.close()
            assert names(stock) == ["Eve"]

    def test_commit_and_rollback_of_a_stock_engine_seem_as_in_production(
        self, stock: sa.Engine
    ) -> None:
        with isolate(stock):
            with Session(stock) as session:
                session.add(Author(name="Eve"))
                session.commit()
                session.add(Author(name="Fay"))
                session.flush()
                session.rollback()
                session.add(Author(name="Ada"))
                with pytest.raises(exc.IntegrityError):
                    session.commit()
                session.rollback()
                with session.begin_nested():
                    session.add(Author(name="Gus"))
                session.commit()
            assert names(stock) == ["Eve", "Gus"]
        assert names(stock) == []

    def test_autocommit_of_a_stock_engine_works_in_isolation(self, stock: sa.Engine) -> None:
        with isolate(stock):
            options = {"isolation_level": "AUTOCOMMIT"}
            with stock.connect().execution_options(**options) as connection:
                connection.execute(sa.insert(authors).values(name="Eve"))
                connection.rollback()
            assert names(stock) == ["Eve"]
            with stock.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
                connection.execute(sa.insert(authors).values(name="Fay"))
            assert names(stock) == ["Eve"]

    def test_a_stream_of_a_stock_engine_works_in_isolation(self, stock: sa.Engine) -> None:
        with isolate(stock), Session(stock) as session:
            statement = sa.select(Author.name).execution_options(yield_per=1)
            assert session.scalars(statement).all() == ["Ada", "Bob", "Cid"]


class TestIsolationInIsolation:
    def test_an_inner_isolation_is_undone_at_its_own_end(self, engine: OptInEngine) -> None:
        with isolate(engine):
            add_author(engine, "Eve")
            for name in ("Fay", "Gus"):
                with isolate(engine):
                    add_author(engine, name)
                    assert names(engine) == ["Eve", name]
                assert names(engine) == ["Eve"]
            add_author(engine, "Hal")
            assert names(engine) == ["Eve", "Hal"]
        assert names(engine) == []

    def test_an_inner_isolation_is_refused_in_an_open_transaction(
        self, engine: OptInEngine
    ) -> None:
        with isolate(engine):
            isolation = isolate(engine)
            with engine.begin() as connection:
                connection.execute(sa.insert(authors).values(name="Eve"))
                with pytest.raises(exc.InvalidRequestError, match="has to be around it"):
                    isolation.__enter__()
            assert names(engine) == ["Eve"]

    def test_an_inner_isolation_ends_what_is_open_at_its_end(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as before:
            before.get(Author, 1)
            with isolate(engine):
                before.begin()
                before.add(Author(name="lost"))
                before.flush()
            assert names(engine) == []
            with pytest.raises(exc.DBAPIError, match="current transaction is aborted"):
                before.execute(sa.select(authors))
            before.rollback()
            before.add(Author(name="Eve"))
            before.commit()
            assert names(engine) == ["Eve"]

    def test_an_engine_and_its_copy_with_other_options_are_isolated_as_one(
        self, engine: OptInEngine
    ) -> None:
        copy = engine.execution_options(isolation_level="SERIALIZABLE")
        with isolate(engine, copy):
            add_author(copy, "Eve")
            assert names(engine) == ["Eve"]
        with isolate(copy):
            add_author(engine, "Eve")
        assert names(engine) == names(copy) == []


class TestWhatIsRefused:
    def test_an_engine_of_another_driver_is_refused(self) -> None:
        engine = sa.create_engine("sqlite://")
        with pytest.raises(exc.ArgumentError, match="used with pysqlite: leave this engine out"):
            isolate(engine).__enter__()
        engine.dispose()

    def test_an_engine_of_asyncio_is_refused(self) -> None:
        engine = sa.create_engine("postgresql+psycopg_async://")
        with pytest.raises(exc.ArgumentError, match="and asyncio: leave this engine out"):
            isolate(engine).__enter__()

    def test_what_is_no_engine_is_refused(self) -> None:
        for wrong in ([], ["postgresql://"], [None]):
            with pytest.raises(exc.ArgumentError, match="takes engines"):
                isolate(*wrong).__enter__()  # pyright: ignore

    def test_an_engine_with_a_connection_in_use_is_refused(self, engine: OptInEngine) -> None:
        with OptInSession(engine) as session:
            session.get(Author, 1)
            with pytest.raises(exc.InvalidRequestError, match=r"Connections to .* are in use"):
                isolate(engine).__enter__()
            session.give_back()
            with isolate(engine):
                session.execute(sa.delete(Author).where(Author.id == 99))

    def test_one_refused_engine_of_several_leaves_the_others_alone(
        self, engine: OptInEngine
    ) -> None:
        other = sa.create_engine("sqlite://")
        with pytest.raises(exc.ArgumentError):
            isolate(engine, other).__enter__()
        add_author(engine, "Eve")
        assert checked_out(engine) == 0
        other.dispose()

    def test_a_forked_process_is_refused(self, engine: OptInEngine) -> None:
        with isolate(engine):
            add_author(engine, "Eve")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python 3.12: there are other threads
                child = os.fork()
            if not child:
                try:
                    names(engine)
                except exc.InvalidRequestError as error:
                    os._exit("was forked" in str(error))
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
            assert names(engine) == ["Eve"]
