"""The base of our mixins: it checks their place in the bases, and allows models as dataclasses."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import MappedAsDataclass

from ..._core.errors import see
from ._private import ExtensionHooks

if TYPE_CHECKING:
    from typing_extensions import Self

# Reentrant, because a class hook of the user's may make another extension meanwhile.
_undecorating = threading.RLock()


class DeclarativeBaseMixin(ExtensionHooks):
    """Lets ``model_class`` be a ``MappedAsDataclass`` base on every SQLAlchemy 2.

    Flask-SQLAlchemy makes ``db.Model`` by copying the attributes of ``model_class`` into a new
    class with the same bases. SQLAlchemy makes the new class a dataclass again, and refuses to do
    so if the copy has the attributes that it made the first time. SQLAlchemy 2.1 always refuses,
    and 2.0 refuses if the base asks for ``order`` or ``unsafe_hash``.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the extension.

        :raises TypeError: if ``SQLAlchemy`` is not among the bases of the class, or if one of our
            mixins comes after it.
        """
        order = cls.__mro__
        if SQLAlchemy not in order:
            bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
            if cls.__module__.startswith(f"{__package__}."):
                raise TypeError(
                    f"{cls.__name__} is a mixin, and no extension: derive one, class Database("
                    f"{cls.__name__}, SQLAlchemy), from it and from flask_sqlalchemy.SQLAlchemy."
                    + see("mixin-bases")
                )
            raise TypeError(
                f"{cls.__name__} is no Flask-SQLAlchemy extension without SQLAlchemy among its "
                "bases: import it from flask_sqlalchemy, and write "
                f"class {cls.__name__}({bases}, SQLAlchemy)." + see("mixin-bases")
            )
        for mixin in order[order.index(SQLAlchemy) :]:
            if issubclass(mixin, DeclarativeBaseMixin):
                raise TypeError(
                    f"In the bases of {cls.__name__}, {mixin.__name__} comes after SQLAlchemy, "
                    f"where it has no effect. Put it before: class {cls.__name__}("
                    f"{mixin.__name__}, SQLAlchemy)." + see("mixin-bases")
                )
        return super().__new__(cls)

    def _base_of_models(self, model_class: Any, disable_autonaming: bool = False) -> Any:
        """Make ``db.Model`` as Flask-SQLAlchemy does. Sends nothing to the database.

        :param model_class: The class that was passed to the extension.
        :param disable_autonaming: Whether to leave ``__tablename__`` to the models.
        :returns: The base class of the models.
        """
        with _undecorated(model_class):
            return super()._base_of_models(model_class, disable_autonaming)


@contextmanager
def _undecorated(model_class: type[Any]) -> Generator[None, None, None]:
    """Remove from a class, in this block, what the dataclass decorator would refuse to repeat."""
    with _undecorating:
        made = _made_by_dataclass(model_class)
        for name in made:
            delattr(model_class, name)
        try:
            yield
        finally:
            # Models may also be derived from the class itself, which then has to be complete.
            for name, value in made.items():
                setattr(model_class, name, value)


def _made_by_dataclass(model_class: type[Any]) -> dict[str, Any]:
    own = vars(model_class)
    if not issubclass(model_class, MappedAsDataclass) or "__dataclass_fields__" not in own:
        # The class is no dataclass, or the user has decorated it, and nothing repeats that.
        return {}
    names = ["__dataclass_fields__"]
    parameters = own["__dataclass_params__"]
    # These methods can't be the user's, because the decorator refuses a class that defines one of
    # them. The decorator leaves other methods unchanged.
    if parameters.order:
        names += ["__lt__", "__le__", "__gt__", "__ge__"]
    if parameters.unsafe_hash:
        names += ["__hash__"]
    return {name: own[name] for name in names}
