"""``atomic_requests()`` and its marks refuse what can't be atomic, with an error that says why."""

from __future__ import annotations

import pytest
from flask import Blueprint

from tests.flask.atomic_requests.support import House


def test_atomic_requests_is_refused_after_the_first_request(plain: House) -> None:
    plain.web.test_client().get("/")
    with pytest.raises(AssertionError, match="can no longer be called on the application"):
        plain.owner.atomic_requests(plain.web)


def test_a_blueprint_that_is_registered_already_is_refused(plain: House) -> None:
    api = Blueprint("api", "api")
    plain.web.register_blueprint(api)
    with pytest.raises(AssertionError, match="can no longer be called on the blueprint"):
        plain.owner.atomic_requests(api)


def test_methods_that_are_one_string_are_refused(plain: House) -> None:
    with pytest.raises(TypeError, match=r"methods=\['POST'\]"):
        plain.owner.atomic_requests(plain.web, methods="POST")


def test_what_is_neither_application_nor_blueprint_is_refused(plain: House) -> None:
    def view() -> None: ...

    with pytest.raises(TypeError, match="takes a Flask application or blueprint"):
        plain.extension.atomic_requests(view)
    with pytest.raises(TypeError, match="takes a Flask application or blueprint"):
        plain.extension.atomic_requests(None)


@pytest.mark.parametrize("mark", ["atomic_request", "non_atomic_request"])
def test_a_bound_method_can_not_be_marked(plain: House, mark: str) -> None:
    class Views:
        def view(self) -> str:
            return ""

    with pytest.raises(TypeError, match=r"can't be marked.*where the view is defined"):
        getattr(plain.owner, mark)(Views().view)
