"""Flask-SQLAlchemy-Lite; a request is an application context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from flask import Flask
from flask_sqlalchemy_lite import SQLAlchemy
from sqlalchemy import Engine
from sqlalchemy.orm import DeclarativeBase

from benchmarks.peers import MAX_OVERFLOW, POOL_SIZE
from benchmarks.peers.flask_sqlalchemy import OnSQLAlchemy


class Lite(OnSQLAlchemy):
    """Flask-SQLAlchemy-Lite as it is."""

    title = "Flask-SQLAlchemy-Lite"
    fails: ClassVar[Mapping[str, str]] = {"paginate": "it has no paginate()"}

    def __init__(
        self, url: str, pool_size: int = POOL_SIZE, max_overflow: int = MAX_OVERFLOW
    ) -> None:
        super().__init__(url, pool_size, max_overflow)
        self.app = Flask("benchmark")
        options = {"url": url, "pool_size": pool_size, "max_overflow": max_overflow}
        self.app.config["SQLALCHEMY_ENGINES"] = {"default": options}
        self.db = SQLAlchemy(self.app)

        class Base(DeclarativeBase):
            pass

        self.declare(Base)

    @property
    def session(self) -> Any:
        """``db.session``."""
        return self.db.session

    @property
    def engine(self) -> Engine:
        """``db.engine``."""
        return self.db.engine

    def page(self, number: int, per_page: int) -> list[Any]:
        """Refuse: Flask-SQLAlchemy-Lite has no paginator."""
        raise NotImplementedError("Flask-SQLAlchemy-Lite has no paginate().")
