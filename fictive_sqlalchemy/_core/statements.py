"""What is done before a statement: refuse it, begin a transaction, declare a cursor WITH HOLD.

SQLAlchemy's compiler knows whether a statement locks, even in a subquery or in a CTE.
SQLAlchemy's execution context knows whether a statement reads with a server-side cursor.
"""

from __future__ import annotations

from functools import lru_cache
from secrets import token_hex
from typing import Any, Protocol, runtime_checkable

from sqlalchemy import exc
from sqlalchemy.engine import Dialect

from . import observing
from .autocommit import HELD_CURSORS, PSYCOPG
from .errors import see
from .results import DeclaredCursors
from .server_state import Left, examine, left_behind
from .sql import ends_transaction, evidently_reads


@runtime_checkable
class NotesWhatIsLeft(Protocol):
    """A connection of ours. SQLAlchemy makes other ones to ask the server for its version."""

    def note_left_behind(self, left: Left) -> None: ...


@lru_cache(maxsize=2048)
def _is_ordinary(sql: str) -> bool:
    """Tell whether SQL leaves nothing on the server's session and ends no transaction.

    :param sql: One statement or more.
    """
    return examine(sql) is None and not ends_transaction(sql)


def guard_statements_outside(dialect: Dialect) -> None:
    """Look at each statement of a dialect before it is sent outside a transaction.

    If the session has ``begin_on_write=True``, a statement that may write or lock begins the
    session's transaction. For a connection of ``engine.connect()``, the option of the engine
    counts. Without the option, a SELECT that locks is refused before it is sent, because the lock
    would be released at the end of the statement. (A statement that also writes may lock, because
    the lock is for the write, which ends with the same statement.) A server-side cursor is declared
    WITH HOLD, so that no transaction is open while its rows are read:
    https://www.postgresql.org/docs/current/sql-declare.html

    :param dialect: The dialect of an engine of ours, and of no other engine.
    """
    compiler: Any = dialect.statement_compiler
    context: Any = dialect.execution_ctx_cls

    class NotingCompiler(compiler):  # type: ignore[misc]
        locks = False
        writes = False

        def for_update_clause(self, *args: Any, **kwargs: Any) -> Any:
            self.locks = True
            return super().for_update_clause(*args, **kwargs)  # pyright: ignore

        def visit_insert(self, *args: Any, **kwargs: Any) -> Any:
            self.writes = True
            return super().visit_insert(*args, **kwargs)  # pyright: ignore

        def visit_update(self, *args: Any, **kwargs: Any) -> Any:
            self.writes = True
            return super().visit_update(*args, **kwargs)  # pyright: ignore

        def visit_delete(self, *args: Any, **kwargs: Any) -> Any:
            self.writes = True
            return super().visit_delete(*args, **kwargs)  # pyright: ignore

    class GuardedContext(context):  # type: ignore[misc]
        declares: Any = None  # the cursor WITH HOLD that the statement declares
        had_cursors = False  # whether the connection had such a cursor before
        take_back: Any = None  # an observer's function to call if the statement fails

        def pre_exec(self) -> None:
            compiled = self.compiled
            # Each statement passes through here. getattr() and lru_cache() call no Python function.
            if getattr(compiled, "locks", False) or getattr(
                self.root_connection, "begins_on_write", False
            ):
                self.begin_if_it_writes()
                if self.locks_in_vain() and not self.root_connection.is_inside():
                    raise exc.InvalidRequestError(
                        "with_for_update() outside a transaction protects nothing, because the "
                        "server releases the lock when the statement ends: put the read, and the "
                        "write that depends on it, into `with session.begin():`. Nothing was "
                        "sent." + see("lock-outside")
                    )
            sql = self.unicode_statement if compiled is None else compiled.string
            if not _is_ordinary(sql):
                left = left_behind(sql, self.parameters)
                if left is not None and isinstance(self.root_connection, NotesWhatIsLeft):
                    self.root_connection.note_left_behind(left)
                connection: Any = self.root_connection
                if ends_transaction(sql) and getattr(connection, "session_transaction", None):
                    connection.refuse_to_end_by_statement()
            context.pre_exec(self)  # super() is slower

        def begin_if_it_writes(self) -> None:
            """Begin the transaction that the statement needs, if ``begin_on_write`` is set."""
            connection = self.root_connection
            if not connection.begins_on_write:
                return
            is_inside, observer = connection.is_inside(), observing.observer
            if is_inside and observer is None:
                return
            compiled = self.compiled
            reads = evidently_reads(self.unicode_statement if compiled is None else compiled.string)
            if reads and (is_inside or not connection.reads_begin()):
                return
            if not is_inside:
                before = connection.held
                connection.begin_implicitly()
                if connection.held is not before and getattr(self, "cursor", None) is not None:
                    self.cursor = connection.taken.cursor()  # the first one was lost meanwhile
            owner = connection.owner
            if observer is not None and owner is not None and not reads:
                take_back = observer.statement_writes(owner, only_locks=self.locks_in_vain())
                self.take_back = take_back or self.take_back  # a stream passes here twice

        def create_server_side_cursor(self) -> Any:
            connection = self.root_connection
            self.begin_if_it_writes()
            if (recorder := observing.recorder) is not None:
                with recorder.noting_cursor(connection):
                    return self._create_server_side_cursor()
            return self._create_server_side_cursor()

        def _create_server_side_cursor(self) -> Any:
            connection = self.root_connection
            if self.dialect.driver not in PSYCOPG:
                return super().create_server_side_cursor()  # pyright: ignore
            if connection.is_inside():
                # super() would take the DBAPI connection that was held before begin_if_it_writes().
                cursor = connection.taken.cursor(f"stream_{token_hex(8)}")
                if self.dialect.driver == "psycopg":
                    if connection.declared is None:
                        connection.declared = DeclaredCursors()
                    connection.declared.add(cursor)
                return cursor
            if self.locks_in_vain():
                return self.create_default_cursor()  # pre_exec() refuses, so nothing is sent
            connection.has_streamed = True
            info = connection.taken.info
            self.had_cursors, info[HELD_CURSORS] = HELD_CURSORS in info, True
            # Random: behind a pooler several clients share a server session, so fixed names would
            # collide.
            self.declares = connection.taken.cursor(f"held_{token_hex(8)}", withhold=True)
            return self.declares

        def locks_in_vain(self) -> bool:
            """Tell whether the statement locks rows, and no part of it writes."""
            compiled = self.compiled
            return getattr(compiled, "locks", False) and not compiled.writes

    dialect.statement_compiler = NotingCompiler
    dialect.execution_ctx_cls = GuardedContext
