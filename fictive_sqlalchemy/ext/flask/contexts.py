"""The sessions of the application contexts."""

from __future__ import annotations

from typing import TypeVar
from weakref import ref

from flask.ctx import AppContext
from sqlalchemy.util import ScopedRegistry

S = TypeVar("S")


class ContextRegistry(ScopedRegistry[S]):
    """The objects of the application contexts, each of which goes with its context.

    The key is a weak reference to the context itself. An ``id()`` may be that of a later context,
    which would get the object of this one. It is a dictionary and no ``WeakKeyDictionary``, because
    each use of a scoped session comes here, and a dictionary calls no function of Python's.

    :param createfunc: Makes the object of a context.
    :param scopefunc: Returns the current context.
    """

    def __call__(self) -> S:
        """Return the object of the current context; make it if there is none."""
        context = self.scopefunc()
        try:
            found: S = self.registry[ref(context)]
        except KeyError:
            found = self.registry.setdefault(self._key(context), self.createfunc())
        return found

    def has(self) -> bool:
        """Tell whether the current context has an object."""
        return ref(self.scopefunc()) in self.registry

    def set(self, obj: S) -> None:
        """Give the current context another object.

        :param obj: The object.
        """
        self.registry[self._key(self.scopefunc())] = obj

    def clear(self) -> None:
        """Forget the object of the current context."""
        self.registry.pop(ref(self.scopefunc()), None)

    def _key(self, context: AppContext) -> ref[AppContext]:
        registry = self.registry  # and not self, which the reference would keep alive
        return ref(context, lambda gone: registry.pop(gone, None))
