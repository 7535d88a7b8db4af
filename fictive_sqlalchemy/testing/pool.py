"""The pool that gives out stand-ins, in the place of an engine's own pool."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, NullPool, event, exc

from .._core.errors import see
from .._core.records import given_back
from .isolation import Isolation
from .stand_in import StandIn
from .stand_in_psycopg import PsycopgStandIn
from .stand_in_psycopg2 import Psycopg2StandIn

_STAND_INS: dict[str, type[StandIn]] = {"psycopg2": Psycopg2StandIn, "psycopg": PsycopgStandIn}


@contextmanager
def isolated_pool(engine: Engine, patience: float) -> Generator[None]:
    """Isolate one engine.

    :param engine: The engine; it may be isolated already.
    :param patience: How many seconds a thread waits for another thread, and a statement for a lock.
    :returns: A context manager.
    :raises sqlalchemy.exc.ArgumentError: if the engine's driver cannot be isolated.
    :raises sqlalchemy.exc.InvalidRequestError: as :func:`fictive_sqlalchemy.testing.isolate` does.
    """
    pool = engine.pool
    if isinstance(pool, IsolatedPool):
        with pool.isolation.nested():
            yield
        return
    stand_in = _stand_in_class(engine)
    _refuse_if_in_use(engine)
    held = engine.raw_connection()
    try:
        isolation = Isolation(engine, held, stand_in, patience)
    except BaseException:
        held.invalidate()
        raise
    isolated = IsolatedPool(isolation)
    event.listen(isolated, "reset", given_back)
    dispatch: Any = pool.dispatch
    for name in ("checkout", "checkin"):  # the user's listeners may set the id of a tenant
        for listener in getattr(dispatch, name).listeners:
            event.listen(isolated, name, listener)
    try:
        event.listen(engine, "engine_connect", isolation.note_connection)
        engine.pool = isolated
        yield
    finally:
        engine.pool = pool
        try:
            if event.contains(engine, "engine_connect", isolation.note_connection):
                event.remove(engine, "engine_connect", isolation.note_connection)
            isolation.end()
        finally:
            if isolated.disposed:
                engine.dispose()


class IsolatedPool(NullPool):
    """The pool of an engine while it is isolated: it gives out stand-ins.

    :param isolation: The isolation.
    """

    def __init__(self, isolation: Isolation) -> None:
        super().__init__(isolation.connect, reset_on_return=None, dialect=isolation.dialect)
        self.isolation = isolation
        self.disposed = False

    def dispose(self) -> None:
        """Note the call: the connections of the engine's own pool are closed at the end."""
        self.disposed = True

    def recreate(self) -> IsolatedPool:
        """Return this pool: ``engine.dispose()`` does not end the isolation."""
        return self


def _stand_in_class(engine: Engine) -> type[StandIn]:
    dialect = engine.dialect
    if dialect.driver in _STAND_INS and not dialect.is_async:
        return _STAND_INS[dialect.driver]
    with_asyncio = " and asyncio" if dialect.is_async else ""
    raise exc.ArgumentError(
        f"Only engines that use psycopg2 or psycopg can be isolated, and {engine.url!r} is "
        f"used with {dialect.driver}{with_asyncio}: leave this engine out, and clean up after "
        "it yourself." + see("isolated-drivers")
    )


def _refuse_if_in_use(engine: Engine) -> None:
    checked_out: Callable[[], int] | None = getattr(engine.pool, "checkedout", None)
    if checked_out is not None and (number := checked_out()):
        raise exc.InvalidRequestError(
            f"Connections to {engine.url!r} are in use ({number}), and what is done with them "
            "could not be undone: call close() of the sessions and connections that were used "
            "before, or remove() of the scoped session." + see("in-use-before-isolation")
        )
