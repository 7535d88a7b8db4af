"""The mixin that makes a Flask-SQLAlchemy extension's reads untransacted and its transactions real."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import sqlalchemy
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session as FlaskSession
from sqlalchemy.engine import URL, Engine, make_url

from ...engine import engine_from_config
from ...session import OptInScopedSession, OptInSession
from ...transactions import TRANSACTION_CONNECTIONS, TransactionConnections
from .declarative import DeclarativeBaseMixin


class Session(OptInSession, FlaskSession):
    """Flask-SQLAlchemy's session, which chooses the bind by the model's bind key, with transactions you opt in to.

    What ``db.session`` is made of. Subclass it and pass it as ``session_options={"class_": …}`` to customize.
    """


class OptInTransactionMixin(DeclarativeBaseMixin):
    """Put it before ``SQLAlchemy`` in the bases of your extension::

        class Database(OptInTransactionMixin, SQLAlchemy):
            pass

    Reads then run untransacted and ``with db.session.begin():`` is a transaction, on every bind whose backend is in
    :attr:`AUTOCOMMIT_DRIVERS`. The others are as Flask-SQLAlchemy makes them.
    """

    AUTOCOMMIT_DRIVERS: ClassVar[list[str]] = ["postgresql"]
    """Backends whose connections rest in autocommit. A subclass may name any whose dialect offers AUTOCOMMIT."""

    TRANSACTION_CONNECTIONS: ClassVar[TransactionConnections] = TRANSACTION_CONNECTIONS
    """A live view of the open transactions and the connections each took out of autocommit."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        bases = cls.__mro__
        if SQLAlchemy in bases and bases.index(SQLAlchemy) < bases.index(OptInTransactionMixin):
            raise TypeError(
                f"{cls.__name__} names SQLAlchemy before OptInTransactionMixin, which would leave the mixin without "
                f"effect. Turn them round: class {cls.__name__}(OptInTransactionMixin, …, SQLAlchemy)."
            )
        return super().__new__(cls)

    def create_engine(self, sa_url: str | URL, engine_opts: Mapping[str, Any]) -> Engine:
        """Create the engine of one bind. Sends nothing.

        :param sa_url: The database.
        :param engine_opts: Options of ``sqlalchemy.create_engine()``. ``isolation_level`` is that of transactions.
        :returns: an :class:`.OptInEngine` if the backend is in :attr:`AUTOCOMMIT_DRIVERS`, else SQLAlchemy's own.
        :raises sqlalchemy.exc.ArgumentError: if an option contradicts autocommit, if the database does not know the
            isolation level, or if the dialect does not offer AUTOCOMMIT.
        """
        options = {**engine_opts, "url": sa_url}
        if make_url(sa_url).get_backend_name() in self.AUTOCOMMIT_DRIVERS:
            return engine_from_config(options, prefix="")
        return sqlalchemy.engine_from_config(options, prefix="")

    def create_scoped_session(self, options: dict[str, Any] | None = None) -> OptInScopedSession[Any]:
        """Create the session that is ``db.session``.

        :param options: Flask-SQLAlchemy's ``session_options``. A ``class_`` is combined with :class:`.OptInSession`.
        """
        options = dict(options or {})
        class_ = options.setdefault("class_", Session)
        if not issubclass(class_, OptInSession):
            options["class_"] = type(f"OptIn{class_.__name__}", (OptInSession, class_), {"__doc__": class_.__doc__})
        stock = super()._make_scoped_session(options)  # type: ignore[misc]  # private: as below
        return OptInScopedSession(stock.session_factory, stock.registry.scopefunc)

    def _make_scoped_session(self, options: dict[str, Any]) -> OptInScopedSession[Any]:
        # private: Flask-SQLAlchemy 3 has no public way to choose the scoped session; 2 called it create_scoped_session
        return self.create_scoped_session(options)

    def _make_engine(self, bind_key: str | None, options: dict[str, Any], app: Flask) -> Engine:
        # private: Flask-SQLAlchemy 3 has no public way to choose the engine; 2 called it create_engine
        options = dict(options)
        return self.create_engine(options.pop("url"), options)
