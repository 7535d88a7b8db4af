"""The engine of a mapped class, found faster than by Flask-SQLAlchemy's session."""

from __future__ import annotations

from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session as FlaskSession
from sqlalchemy import Table
from sqlalchemy.orm import Mapper

from ._private import current_app_context

# Stands for a table that names no engine, because None names the default engine.
_NO_KEY = object()


class BindSession(FlaskSession):
    """Flask-SQLAlchemy's session, which remembers the engines of the current application.

    Each read asks for the engine of a mapped class. Flask-SQLAlchemy looks up the engines of the
    current application each time. This session looks them up only when the application changes.

    :param db: The extension.
    :param kwargs: Further arguments, as Flask-SQLAlchemy's session takes them.
    """

    # The application that was current at the last use, and its engines.
    _engines: Any = None
    _app: Flask | None = None

    def __init__(self, db: SQLAlchemy, **kwargs: Any) -> None:
        super().__init__(db, **kwargs)
        self._extension = db

    def get_bind(
        self, mapper: Any = None, clause: Any = None, bind: Any = None, **kwargs: Any
    ) -> Any:
        """Return the engine of a mapped class or a statement, as Flask-SQLAlchemy's session does.

        :param mapper: The mapped class, or its mapper.
        :param clause: The statement.
        :param bind: The engine or connection, if the caller has chosen one.
        :param kwargs: Further arguments that SQLAlchemy passes on.
        """
        if bind is None and isinstance(mapper, Mapper):
            app = current_app_context().app
            if app is not self._app:
                self._note(app)
            table: Any = mapper.local_table  # pyright: ignore[reportUnknownMemberType]
            if self._engines is not None and isinstance(table, Table):
                # The dictionary is remembered, and not the engine: tests replace engines in it.
                engine = self._engines.get(table.metadata.info.get("bind_key", _NO_KEY))
                if engine is not None:
                    return engine
        return super().get_bind(
            mapper=mapper,  # pyright: ignore[reportUnknownArgumentType]
            clause=clause,
            bind=bind,
            **kwargs,
        )

    def _note(self, app: Flask) -> None:
        """Remember an application and its engines, unless a subclass overrides ``engines``."""
        extension, self._engines = self._extension, None
        if type(extension).engines is SQLAlchemy.engines:
            self._engines = extension.engines
        self._app = app
