"""What our mixins share: a check of their place in the bases, and ``db.Model`` from a dataclass."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import MappedAsDataclass

from ._private import ExtensionHooks

if TYPE_CHECKING:
    from typing_extensions import Self

# Reentrant, because a class hook of the user's may make another extension meanwhile.
_undecorating = threading.RLock()


class DeclarativeBaseMixin(ExtensionHooks):
    """Lets ``model_class`` be a ``MappedAsDataclass`` base on every SQLAlchemy 2.

    Flask-SQLAlchemy makes ``db.Model`` by copying the attributes of ``model_class`` into a new
    class with the same bases. SQLAlchemy makes the new class a dataclass again, and refuses when
    what it made the first time came along in the copy: since 2.1 always, on 2.0 when the base
    asks for ``order`` or ``unsafe_hash``.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the extension.

        :raises TypeError: if ``SQLAlchemy`` is not among its bases, or one of our mixins stands
            behind it.
        """
        order = cls.__mro__
        if SQLAlchemy not in order:
            bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
            if cls.__module__.startswith(f"{__package__}."):
                raise TypeError(
                    f"{cls.__name__} is a mixin, and no extension: derive one, class Database("
                    f"{cls.__name__}, SQLAlchemy), from it and from flask_sqlalchemy.SQLAlchemy."
                )
            raise TypeError(
                f"{cls.__name__} is no Flask-SQLAlchemy extension without SQLAlchemy among its "
                "bases: import it from flask_sqlalchemy, and write "
                f"class {cls.__name__}({bases}, SQLAlchemy)."
            )
        for mixin in order[order.index(SQLAlchemy) :]:
            if issubclass(mixin, DeclarativeBaseMixin):
                raise TypeError(
                    f"In the bases of {cls.__name__}, {mixin.__name__} comes after SQLAlchemy, "
                    f"where it has no effect. Put it before: class {cls.__name__}("
                    f"{mixin.__name__}, SQLAlchemy)."
                )
        return super().__new__(cls)

    def _base_of_models(self, model_class: Any, disable_autonaming: bool = False) -> Any:
        """Make ``db.Model`` as Flask-SQLAlchemy does. Sends nothing to the database.

        :param model_class: The class passed to the extension.
        :param disable_autonaming: Leave ``__tablename__`` to the models.
        :returns: The base class of the models.
        """
        with _undecorated(model_class):
            return super()._base_of_models(model_class, disable_autonaming)


@contextmanager
def _undecorated(model_class: type[Any]) -> Generator[None, None, None]:
    """Remove from a class, for a while, what the dataclass decorator would refuse to make again."""
    with _undecorating:
        made = _made_by_dataclass(model_class)
        for name in made:
            delattr(model_class, name)
        try:
            yield
        finally:
            # Models may also be made from the class itself, which needs it whole.
            for name, value in made.items():
                setattr(model_class, name, value)


def _made_by_dataclass(model_class: type[Any]) -> dict[str, Any]:
    own = vars(model_class)
    if not issubclass(model_class, MappedAsDataclass) or "__dataclass_fields__" not in own:
        # Not a dataclass, or the user's own decoration, which nothing will repeat.
        return {}
    names = ["__dataclass_fields__"]
    parameters = own["__dataclass_params__"]
    # These can't be the user's: the decorator refuses a class that defines one of them. The
    # other methods it leaves as it finds them.
    if parameters.order:
        names += ["__lt__", "__le__", "__gt__", "__ge__"]
    if parameters.unsafe_hash:
        names += ["__hash__"]
    return {name: own[name] for name in names}
