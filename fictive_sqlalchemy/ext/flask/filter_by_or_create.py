"""``Model.filter_by_or_create`` and ``update_or_create`` for the models of Flask-SQLAlchemy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from sqlalchemy import MetaData, exc
from sqlalchemy.orm import Session, scoped_session

from ..._core.errors import see
from ...filter_by_or_create import filter_by_or_create, update_or_create
from ._private import extension_of
from .declarative import DeclarativeBaseMixin

T = TypeVar("T")


class FilterByOrCreate(Generic[T]):
    """The callable ``Model.filter_by_or_create``: it finds an object of the model or creates it.

    :param model: The model.
    """

    def __init__(self, model: type[T]) -> None:
        self.model = model

    def __call__(self, /, *, defaults: Mapping[str, Any] | None = None, **filters: Any) -> T:
        """Return the one object that ``filter_by(**filters)`` finds, or create it::

            user = User.filter_by_or_create(email="ada@example.com", defaults={"name": "Ada"})

        Outside a transaction, a new object is stored when the call returns, and other pending
        changes stay pending. Inside, the new object is part of the transaction. See
        :func:`fictive_sqlalchemy.filter_by_or_create.filter_by_or_create` for what is sent.

        :param defaults: Further values for a new object.
        :param filters: The values to search for, by the names of attributes. A new object gets
            them, too.
        :returns: The object, which belongs to the session.
        :raises sqlalchemy.exc.ArgumentError: if there is nothing to search for, or if a name is
            both a filter and in ``defaults``. Nothing is sent.
        :raises sqlalchemy.exc.InvalidRequestError: if the model has no attribute of a given name,
            or if a related object can't be used here. Nothing is stored.
        :raises sqlalchemy.exc.MultipleResultsFound: if the search finds more than one object.
        :raises sqlalchemy.exc.DBAPIError: if the database refuses the new row.
        """
        return self.with_created(defaults=defaults, **filters)[0]

    def with_created(
        self, /, *, defaults: Mapping[str, Any] | None = None, **filters: Any
    ) -> tuple[T, bool]:
        """Find or create the object, and tell whether this call has created it::

            user, created = User.filter_by_or_create.with_created(email="ada@example.com")

        :param defaults: Further values for a new object.
        :param filters: The values to search for.
        :returns: The object, and ``True`` if it was created, ``False`` if it was found.
        """
        return filter_by_or_create(
            _session_of(self.model), self.model, filters, {} if defaults is None else defaults
        )


class FilterByOrCreateProperty:
    """The descriptor that gives every model its own :class:`FilterByOrCreate`."""

    def __get__(self, instance: object, owner: type[T]) -> FilterByOrCreate[T]:
        return FilterByOrCreate(owner)


class UpdateOrCreate(Generic[T]):
    """The callable ``Model.update_or_create``: it updates an object of the model or creates it.

    :param model: The model.
    """

    def __init__(self, model: type[T]) -> None:
        self.model = model

    def __call__(
        self,
        /,
        *,
        defaults: Mapping[str, Any] | None = None,
        create_defaults: Mapping[str, Any] | None = None,
        **filters: Any,
    ) -> T:
        """Update the one object that ``filter_by(**filters)`` finds, or create it::

            user = User.update_or_create(email="ada@example.com", defaults={"name": "Ada"})

        Outside a transaction, the object is stored when the call returns, and other pending changes
        stay pending. Inside, the change is part of the transaction. If the object has the values
        already, only the SELECT is sent. See
        :func:`fictive_sqlalchemy.filter_by_or_create.update_or_create` for what is sent, and for
        what concurrent calls do.

        :param defaults: The values that the object gets, whether it is found or new.
        :param create_defaults: The values for a new object, if given, in place of ``defaults``.
        :param filters: The values to search for, by the names of attributes. A new object gets
            them, too.
        :returns: The object, which belongs to the session.
        :raises sqlalchemy.exc.ArgumentError: if there is nothing to search for, or if a name is
            both a filter and in the defaults. Nothing is sent.
        :raises sqlalchemy.exc.InvalidRequestError: if the model has no attribute of a given name,
            if an attribute of an object that is found can't be changed, such as a primary key, or
            if a related object can't be used here. Nothing is stored.
        :raises sqlalchemy.exc.MultipleResultsFound: if the search finds more than one object.
        :raises sqlalchemy.exc.DBAPIError: if the database refuses the row.
        """
        return self.with_created(defaults=defaults, create_defaults=create_defaults, **filters)[0]

    def with_created(
        self,
        /,
        *,
        defaults: Mapping[str, Any] | None = None,
        create_defaults: Mapping[str, Any] | None = None,
        **filters: Any,
    ) -> tuple[T, bool]:
        """Update or create the object, and tell whether this call has created it::

            user, created = User.update_or_create.with_created(
                email="ada@example.com", defaults={"name": "Ada"}
            )

        :param defaults: The values that the object gets, whether it is found or new.
        :param create_defaults: The values for a new object, if given, in place of ``defaults``.
        :param filters: The values to search for.
        :returns: The object, and ``True`` if it was created, ``False`` if it was found.
        """
        return update_or_create(
            _session_of(self.model),
            self.model,
            filters,
            {} if defaults is None else defaults,
            create_defaults,
        )


class UpdateOrCreateProperty:
    """The descriptor that gives every model its own :class:`UpdateOrCreate`."""

    def __get__(self, instance: object, owner: type[T]) -> UpdateOrCreate[T]:
        return UpdateOrCreate(owner)


def _session_of(model: type[Any]) -> Session:
    extension = extension_of(model)
    assert extension is not None
    sessions: scoped_session[Any] = extension.session
    session: Session = sessions()
    return session


if TYPE_CHECKING:
    from ._private import ModelBase

    class ModelThatCreates(ModelBase):
        """``db.Model``, as type checkers see it."""

        filter_by_or_create: ClassVar[FilterByOrCreateProperty]
        update_or_create: ClassVar[UpdateOrCreateProperty]

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...


class FilterByOrCreateMixin(DeclarativeBaseMixin):
    """Gives models ``filter_by_or_create`` and ``update_or_create``; put it before ``SQLAlchemy``::

        class Database(FilterByOrCreateMixin, SQLAlchemy): ...

    An ``update_or_create`` of your own, in the ``model_class`` of the extension, is kept.

    This mixin needs no other mixin. Without :class:`.OptInTransactionMixin`, the session begins a
    transaction by itself, and a new object is part of that transaction until you commit.
    """

    if TYPE_CHECKING:
        Model: type[ModelThatCreates]

    def make_declarative_base(self, model: Any, metadata: MetaData | None = None) -> Any:
        """Make a base class for models, with the methods of this mixin. Sends nothing.

        :param model: A base class or mixin for the models, as Flask-SQLAlchemy's ``model_class``. A
            base class that this extension has made before is not made again.
        :param metadata: The default metadata of this extension from now on.
        :returns: The base class of the models.
        :raises sqlalchemy.exc.InvalidRequestError: if the extension has tables in another default
            metadata already.
        """
        if metadata is not None:
            self._use_metadata(metadata)
        if extension_of(model) is not self:
            return self._base_of_models(model)
        _give_methods(model)
        return model

    def _base_of_models(self, model_class: Any, disable_autonaming: bool = False) -> Any:
        model = super()._base_of_models(model_class, disable_autonaming)
        _give_methods(model)
        return model

    def _use_metadata(self, metadata: MetaData) -> None:
        default = self.metadatas.get(None)
        if default is not None and default is not metadata and default.tables:
            raise exc.InvalidRequestError(
                "The default metadata of this extension has tables already: pass the new metadata "
                "to the extension when you make it, with metadata=…." + see("metadata-in-use")
            )
        metadata.info["bind_key"] = None
        self.metadatas[None] = metadata


def _give_methods(model: Any) -> None:
    model.filter_by_or_create = FilterByOrCreateProperty()
    if not hasattr(model, "update_or_create"):  # many applications have one of their own
        model.update_or_create = UpdateOrCreateProperty()
