"""The sessions of the application contexts."""

from __future__ import annotations

from typing import TypeVar
from weakref import ref

from flask.ctx import AppContext
from sqlalchemy.util import ScopedRegistry

S = TypeVar("S")


class ContextRegistry(ScopedRegistry[S]):
    """A registry that keeps one object for each application context, and drops it with the context.

    The key is a weak reference to the context. Flask-SQLAlchemy uses ``id()`` as the key: a later
    context may have the same key, and would then get the object of an earlier context.
    ``registry`` is a plain dictionary, because each use of a scoped session looks up the registry.
    ``WeakKeyDictionary`` is slower, because it is written in Python.

    :param createfunc: A function that makes the object of a context.
    :param scopefunc: A function that returns the current context.
    """

    def __call__(self) -> S:
        """Return the object of the current context; make it if there is none."""
        context = self.scopefunc()
        try:
            found: S = self.registry[ref(context)]
        except KeyError:
            pass  # created below, so that an error of createfunc() has no KeyError as its context
        else:
            return found
        created: S = self.registry.setdefault(self._key(context), self.createfunc())
        return created

    def has(self) -> bool:
        """Tell whether the current context has an object."""
        return ref(self.scopefunc()) in self.registry

    def set(self, obj: S) -> None:
        """Replace the object of the current context.

        :param obj: The object.
        """
        self.registry[self._key(self.scopefunc())] = obj

    def clear(self) -> None:
        """Forget the object of the current context."""
        self.registry.pop(ref(self.scopefunc()), None)

    def _key(self, context: AppContext) -> ref[AppContext]:
        # The callback does not refer to self: it would keep the whole registry and the session
        # factory alive.
        registry = self.registry
        return ref(context, lambda gone: registry.pop(gone, None))
