"""The ready-made resources that most code imports, for any number of apps::

    from fictive_sqlalchemy.ext.flask.shared import Model, db, session

    db.init_app(app)

For an extension of your own, see :mod:`fictive_sqlalchemy.ext.flask.builtins`.
"""

from typing import TYPE_CHECKING

from .builtins import SQLAlchemy

if TYPE_CHECKING:
    from .filter_by_or_create import ModelThatCreates

__all__ = ["Model", "db", "session"]

db = SQLAlchemy()
"""The extension. Call ``db.init_app(app)`` for each app."""

session = db.session
"""``db.session``: scoped to the application context."""

if TYPE_CHECKING:

    class Model(ModelThatCreates): ...
else:
    Model = db.Model
"""``db.Model``: the base class of the models."""
