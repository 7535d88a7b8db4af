"""The calls of a session that may write."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Select, TextClause, exc
from sqlalchemy.orm import object_mapper
from sqlalchemy.sql import visitors

from . import observing
from .errors import see
from .sql import evidently_writes
from .states import INSIDE, SessionStates, is_opt_in
from .writes import Kind, WritingCall, flush_until_stored


class WritingSession(SessionStates):
    """A session that surrounds each call that may write with a :class:`.WritingCall`."""

    def flush(self, objects: Any = None) -> None:
        """Send pending changes; outside, in a transaction that is committed when the call returns.

        Outside, if one object is all that is stored, its INSERT or UPDATE is sent alone.

        With ``begin_on_write=True``, the transaction that ``flush()`` begins outside stays open.

        :param objects: The only objects to flush. Deprecated since SQLAlchemy 2.1.
        :raises Exception: The error of the database. Outside, nothing is stored then, and the
            session is usable at once.
        """
        if self.local_settings is not None and self.flushed_alone is None and not self.is_clean():
            self.refuse_to_store_without_settings()
            if self.writing_call is None:  # otherwise it was called at the start of that call
                self.ask_for_settings()
        flush: Any = super().flush if self.local_settings is None else self._flush_without_asking
        arguments = () if objects is None else (objects,)
        try:
            if self._state is INSIDE or self.is_clean():
                try:
                    flush(*arguments)
                except BaseException as error:
                    self._note_failure(error)
                    raise
                return
            with WritingCall(self, Kind.FLUSH if objects is None else Kind.STATEMENT) as call:
                call.has_flushed = call.kind is not Kind.ALONE
                transaction = self.begin_implicitly()
                transaction.is_last_flush = (
                    call.kind in (Kind.FLUSH, Kind.ALONE) and not self.begins_on_write
                )
                flush(*arguments)
        except BaseException:
            if (observer := observing.observer) is not None:
                observer.flush_fails(self)
            raise

    # For is_one_statement(): a flush() that the user has overridden may send more.
    own_flush = flush

    def _flush_without_asking(self, *arguments: Any) -> None:
        """Flush, and do not call the function of ``local_settings``, which may read, meanwhile."""
        flush: Any = super().flush
        assert self.local_settings is not None
        with self.local_settings.postponed():
            flush(*arguments)

    def _note_failure(self, error: BaseException) -> None:
        innermost = self.innermost()
        if innermost is not None and not innermost.is_active:
            innermost.failure = error

    @contextmanager
    def _noting_failure(self) -> Generator[None]:
        try:
            yield
        except BaseException as error:
            self._note_failure(error)
            raise

    # Statements

    if not TYPE_CHECKING:  # the overloads of the base class say it better

        def execute(self, statement, params=None, **kwargs):
            """Execute a statement; outside a transaction, send it alone and store it at once.

            See :meth:`.OptInConnection.execute`. Outside, a call that may send several writing
            statements is one transaction, all or nothing. If SQLAlchemy flushes pending changes
            before a write, the flush and the write are one transaction, and keep their order.
            """
            if self.local_settings is not None:
                self.ask_for_settings()
            if self._state is INSIDE or (statement.__class__ is Select and self.is_clean()):
                return super().execute(statement, params, **kwargs)
            writing = self._writing(statement, params, kwargs)
            if writing is None:
                return super().execute(statement, params, **kwargs)
            with writing:
                return super().execute(statement, params, **kwargs)

        def scalar(self, statement, params=None, **kwargs):
            """Execute a statement as :meth:`execute` does; return the first value."""
            if self.local_settings is not None:
                self.ask_for_settings()
            if self._state is INSIDE or (statement.__class__ is Select and self.is_clean()):
                return super().scalar(statement, params, **kwargs)
            writing = self._writing(statement, params, kwargs)
            if writing is None:
                return super().scalar(statement, params, **kwargs)
            with writing:
                return super().scalar(statement, params, **kwargs)

        def scalars(self, statement, params=None, **kwargs):
            """Execute a statement as :meth:`execute` does; return the first value of each row."""
            if self.local_settings is not None:
                self.ask_for_settings()
            if self._state is INSIDE or (statement.__class__ is Select and self.is_clean()):
                return super().scalars(statement, params, **kwargs)
            writing = self._writing(statement, params, kwargs)
            if writing is None:
                return super().scalars(statement, params, **kwargs)
            with writing:
                return super().scalars(statement, params, **kwargs)

    def _writing(self, statement: Any, params: Any, kwargs: dict[str, Any]) -> WritingCall | None:
        """Return the :class:`.WritingCall` for a statement outside; ``None`` if it needs none.

        A statement needs no such call if it is the only one that is sent, or does not write.
        """
        if not getattr(statement, "is_dml", False):
            if not isinstance(params, (list, tuple)) and (
                self.is_clean() or not _writes(statement)
            ):
                return None
        elif params or "dml_strategy" in {
            **statement.get_execution_options(),
            **(kwargs.get("execution_options") or {}),
        }:
            # SQLAlchemy may treat it as a bulk call, which needs a SessionTransaction.
            self.autobegun()
        return WritingCall(self, Kind.STATEMENT)

    def bulk_save_objects(self, objects: Iterable[object], *args: Any, **kwargs: Any) -> None:
        """Save objects as SQLAlchemy does; outside, in one transaction, all or nothing.

        Pending changes of the session stay pending, even if the call fails.
        """
        with self._bulk():
            super().bulk_save_objects(objects, *args, **kwargs)

    def bulk_insert_mappings(
        self, mapper: Any, mappings: Iterable[dict[str, Any]], *args: Any, **kwargs: Any
    ) -> None:
        """Insert rows as SQLAlchemy does; outside, in one transaction, all or nothing.

        Pending changes of the session stay pending, even if the call fails.
        """
        with self._bulk():
            super().bulk_insert_mappings(mapper, mappings, *args, **kwargs)

    def bulk_update_mappings(self, mapper: Any, mappings: Iterable[dict[str, Any]]) -> None:
        """Update rows as SQLAlchemy does; outside, in one transaction, all or nothing.

        Pending changes of the session stay pending, even if the call fails.
        """
        with self._bulk():
            super().bulk_update_mappings(mapper, mappings)

    def _bulk(self) -> AbstractContextManager[object]:
        self.ask_for_settings()
        if self.is_inside:
            return self._noting_failure()
        return WritingCall(self, Kind.ALONE if self.is_outside else Kind.STATEMENT)

    def store_alone(self, objects: Collection[object]) -> None:
        """Store these objects alone; outside, a failure leaves the other objects as they are.

        :param objects: New or changed objects. The collection is read after the ``before_flush``
            listeners were called, so it may include objects that the listeners change.
        :raises Exception: The error of the database.
        """
        with self._bulk():
            flush_until_stored(self, objects)

    def refresh(
        self,
        instance: object,
        attribute_names: Iterable[str] | None = None,
        with_for_update: Any = None,
    ) -> None:
        """Refresh an object, as SQLAlchemy's session does.

        :raises sqlalchemy.exc.InvalidRequestError: for ``with_for_update`` outside, unless the
            session has ``begin_on_write=True``. Nothing is sent, and the object keeps its changes.
        """
        if (
            with_for_update
            and not self.is_inside
            and not self.begins_on_write
            and is_opt_in(self.get_bind(object_mapper(instance)))
        ):
            raise exc.InvalidRequestError(
                "refresh(with_for_update=…) outside a transaction protects nothing, because the "
                "server releases the lock when the statement ends: put refresh(), and the write "
                "that depends on it, into `with session.begin():`. Nothing was sent."
                + see("lock-outside")
            )
        super().refresh(instance, attribute_names, with_for_update)


def _writes(statement: Any) -> bool:
    """Tell whether a statement other than ``insert()``, ``update()`` or ``delete()`` writes."""
    if isinstance(statement, TextClause):
        return evidently_writes(str(statement))
    return any(getattr(part, "is_dml", False) for part in visitors.iterate(statement))
