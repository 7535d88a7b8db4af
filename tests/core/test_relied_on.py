"""The package relies on this behaviour of SQLAlchemy's results and execution contexts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine.cursor import (
    BufferedRowCursorFetchStrategy,
    FullyBufferedCursorFetchStrategy,
)
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.sql.compiler import SQLCompiler

from tests.library import Note, NoteBase


@pytest.fixture
def engine() -> Iterator[sa.Engine]:
    engine = sa.create_engine("sqlite://")
    NoteBase.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection:
        yield connection


class TestResults:
    """Not private by name, but in no documentation."""

    def test_a_result_can_be_told_by_its_cursor_strategy_to_read_all_of_its_rows(
        self, connection: sa.Connection
    ) -> None:
        """A result can be told to read all of its rows now."""
        result = connection.execute(sa.text("VALUES (1), (2), (3)"))
        assert result.fetchone() == (1,)
        result.cursor_strategy = FullyBufferedCursorFetchStrategy(
            result.cursor,
            alternate_description=result.cursor_strategy.alternate_cursor_description,
        )
        connection.connection.dbapi_connection.execute("DROP TABLE note")  # type: ignore[union-attr]
        assert [n for (n,) in result.all()] == [2, 3]
        assert result.cursor is None

    def test_a_stream_is_told_by_buffered_row_cursor_fetch_strategy(self, url: str) -> None:
        """How a stream is told from other results, and what makes its cursor."""
        made: list[str] = []
        postgresql = sa.create_engine(url)
        dialect: Any = postgresql.dialect

        class Context(dialect.execution_ctx_cls):  # type: ignore[misc]
            def create_server_side_cursor(self) -> Any:
                made.append("cursor")
                return super().create_server_side_cursor()

        dialect.execution_ctx_cls = Context
        with postgresql.connect() as connection:
            for options in ({"stream_results": True}, {"yield_per": 1}):
                stream = connection.execute(sa.text("VALUES (1), (2)"), execution_options=options)
                assert isinstance(stream.cursor_strategy, BufferedRowCursorFetchStrategy)
                assert len(stream.all()) == 2
            assert made == ["cursor", "cursor"]
            other = connection.execute(sa.text("SELECT 1"))
            assert not isinstance(other.cursor_strategy, BufferedRowCursorFetchStrategy)
        postgresql.dispose()

    def test_a_dialects_own_compiler_and_context_tell_of_locks_and_streams(
        self, engine: sa.Engine
    ) -> None:
        """A dialect's own compiler and context, which tell of locks and streams."""
        seen: list[str] = []
        dialect: Any = engine.dialect

        class Compiler(dialect.statement_compiler):  # type: ignore[misc]
            def for_update_clause(self, *args: Any, **kwargs: Any) -> Any:
                seen.append("for_update_clause")
                return super().for_update_clause(*args, **kwargs)

        class Context(dialect.execution_ctx_cls):  # type: ignore[misc]
            def pre_exec(self) -> None:
                seen.append("pre_exec")
                assert isinstance(self.compiled, Compiler)
                assert self.root_connection is connection
                assert self.is_crud is False
                super().pre_exec()

            def create_server_side_cursor(self) -> Any:
                raise NotImplementedError

        assert hasattr(SQLCompiler, "for_update_clause")
        assert hasattr(DefaultExecutionContext, "create_server_side_cursor")
        dialect.statement_compiler = Compiler
        dialect.execution_ctx_cls = Context
        lock = sa.select(Note.id).with_for_update()
        with engine.connect() as connection:
            for statement in (lock, sa.select(lock.subquery()), sa.select(lock.cte())):
                seen.clear()
                connection.execute(statement)
                assert seen == ["for_update_clause", "pre_exec"]
