"""What a statement outside a transaction may not do, and what a stream does there instead.

SQLAlchemy's compiler knows where a statement locks: in itself, in a subquery or in a CTE. Its
execution context knows which statement reads with a cursor on the server.
"""

from __future__ import annotations

from secrets import token_hex
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import Dialect

from .autocommit import HELD_CURSORS, PSYCOPG


def stand_alone(dialect: Dialect) -> None:
    """Make the statements of a dialect fit to stand alone, when they are outside a transaction.

    A SELECT that locks is refused before it is sent: the lock would be gone with the statement.
    (An INSERT, UPDATE or DELETE may lock what its subquery reads, for it is over by then.) A
    cursor on the server is WITH HOLD, so that no transaction is open while its rows are read:
    https://www.postgresql.org/docs/current/sql-declare.html

    :param dialect: The dialect of an engine of ours, and of no other.
    """
    compiler: Any = dialect.statement_compiler
    context: Any = dialect.execution_ctx_cls

    class NotingCompiler(compiler):  # type: ignore[misc]
        locks = False

        def for_update_clause(self, *args: Any, **kwargs: Any) -> Any:
            self.locks = True
            return super().for_update_clause(*args, **kwargs)  # pyright: ignore

    class StandAloneContext(context):  # type: ignore[misc]
        def pre_exec(self) -> None:
            if getattr(self.compiled, "locks", False) and self.locks_in_vain():
                raise exc.InvalidRequestError(
                    "with_for_update() outside a transaction protects nothing, for the lock would "
                    "be gone with the statement: put the read and what depends on it into "
                    "`with session.begin():`. Nothing was sent."
                )
            super().pre_exec()  # pyright: ignore

        def create_server_side_cursor(self) -> Any:
            if self.root_connection.is_inside() or self.dialect.driver not in PSYCOPG:
                return super().create_server_side_cursor()  # pyright: ignore
            if getattr(self.compiled, "locks", False):
                return self.create_default_cursor()  # it is only made, and pre_exec() refuses
            self.root_connection.has_streamed = True
            connection = self.root_connection.connection
            connection.info[HELD_CURSORS] = True
            # Random, for a pooler between us and the server may know another client's, too.
            return connection.cursor(f"held_{token_hex(8)}", withhold=True)

        def locks_in_vain(self) -> bool:
            return not self.is_crud and not self.root_connection.is_inside()

    dialect.statement_compiler = NotingCompiler
    dialect.execution_ctx_cls = StandAloneContext
