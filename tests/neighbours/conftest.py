"""What the tests of the neighbours share: the applications of the extension's tests."""

from tests.flask.conftest import make_app

__all__ = ["make_app"]
