"""Flask-Dance: its SQLAlchemy storage of tokens, by real logins at a provider of the test's own."""

# Classes that Flask-SQLAlchemy makes at run time are nothing that a type checker can know.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from flask import Flask
from flask.testing import FlaskClient
from flask_dance.consumer import OAuth2ConsumerBlueprint, oauth_authorized
from flask_dance.consumer.storage.sqla import OAuthConsumerMixin, SQLAlchemyStorage
from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import Mapped, mapped_column, relationship
from werkzeug.serving import make_server
from werkzeug.test import TestResponse

from tests.flask.conftest import MakeApp
from tests.flask.support import Database, sent
from tests.wire import WireProxy

pytestmark = pytest.mark.filterwarnings(
    # The mixin's created_at has it for its default, which Python 3.12 deprecates.
    r"ignore:datetime\.datetime\.utcnow:DeprecationWarning"
)


class Provider:
    """A provider, who gives everybody the token that it has."""

    def __init__(self) -> None:
        self.app = Flask("provider")
        self.access_token = "first"
        self.app.post("/token")(self.token)
        self.server = make_server("127.0.0.1", 0, self.app)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def token(self) -> dict[str, str]:
        return {"access_token": self.access_token, "token_type": "bearer"}


@pytest.fixture(scope="module")
def running_provider() -> Iterator[Provider]:
    provider = Provider()
    thread = threading.Thread(target=provider.server.serve_forever)
    thread.start()
    yield provider
    provider.server.shutdown()
    thread.join()
    provider.server.server_close()


@pytest.fixture
def provider(running_provider: Provider, monkeypatch: pytest.MonkeyPatch) -> Provider:
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")  # it has no certificate
    running_provider.access_token = "first"
    return running_provider


class WholeStorage(SQLAlchemyStorage):
    """The old token goes only if the new one is stored."""

    def set(self, *args: Any, **kwargs: Any) -> None:
        self.session.begin()  # which the commit() in set() ends
        try:
            super().set(*args, **kwargs)
        except BaseException:
            self.session.rollback()
            raise


class Site:
    """An application whose users come from the provider."""

    def __init__(
        self,
        make_app: MakeApp,
        url: str,
        provider: Provider,
        storage: type[SQLAlchemyStorage] = SQLAlchemyStorage,
    ) -> None:
        self.db = db = Database()
        self.app = make_app(db, url, SECRET_KEY="secret", TESTING=True)

        class User(db.Model):
            __tablename__ = "users"

            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str] = mapped_column(unique=True)

        class OAuth(OAuthConsumerMixin, db.Model):
            __table_args__ = (CheckConstraint("length(token::text) < 200", name="short"),)

            user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
            user: Mapped[User | None] = relationship()

        self.User: Any = User
        self.OAuth: Any = OAuth
        self.blueprint = OAuth2ConsumerBlueprint(
            "provider",
            __name__,
            client_id="client",
            client_secret="secret",
            base_url=provider.url,
            authorization_url=f"{provider.url}/authorize",
            token_url=f"{provider.url}/token",
            storage=storage(OAuth, db.session),
        )
        self.app.register_blueprint(self.blueprint)

        @self.app.get("/")
        def home() -> str:
            session = self.blueprint.session
            return str(session.token["access_token"] if session.authorized else "nobody")

        with self.app.app_context():
            db.create_all()

    def log_in(self, client: FlaskClient) -> TestResponse:
        """What a browser does."""
        to_provider = client.get("/provider")
        state = parse_qs(urlsplit(to_provider.location).query)["state"][0]
        return client.get(f"/provider/authorized?code=any&state={state}")


@pytest.fixture
def new_site(make_app: MakeApp, wire_url: str, provider: Provider) -> Callable[..., Site]:
    return lambda *args: Site(make_app, wire_url, provider, *args)


def test_who_is_authorized_is_one_read(new_site: Callable[..., Site], wire: WireProxy) -> None:
    site = new_site()
    client = site.app.test_client()
    with wire.record() as recording:
        assert client.get("/").text == "nobody"
    assert sent(recording) == ["SELECT flask_dance_oauth"]
    assert site.log_in(client).status_code == 302
    with wire.record() as recording:
        assert client.get("/").text == "first"
    assert sent(recording) == ["SELECT flask_dance_oauth"]


def test_the_delete_of_an_old_token_stands_alone_before_the_commit(
    new_site: Callable[..., Site], wire: WireProxy, provider: Provider
) -> None:
    site = new_site()
    client = site.app.test_client()
    with wire.record() as recording:
        assert site.log_in(client).status_code == 302
    assert sent(recording) == [
        "DELETE flask_dance_oauth",
        "BEGIN",
        "INSERT flask_dance_oauth",
        "COMMIT",
    ]

    provider.access_token = "long" * 99
    with wire.record() as recording, pytest.raises(IntegrityError):
        site.log_in(client)
    assert sent(recording) == [
        "DELETE flask_dance_oauth",
        "BEGIN",
        "INSERT flask_dance_oauth",
        "ROLLBACK",
    ]
    assert client.get("/").text == "nobody"  # the old token is gone


def test_a_begin_before_storing_a_token_makes_it_one_transaction(
    new_site: Callable[..., Site], wire: WireProxy, provider: Provider
) -> None:
    site = new_site(WholeStorage)
    client = site.app.test_client()
    with wire.record() as recording:
        assert site.log_in(client).status_code == 302
    assert sent(recording) == [
        "BEGIN",
        "DELETE flask_dance_oauth",
        "INSERT flask_dance_oauth",
        "COMMIT",
    ]

    provider.access_token = "long" * 99
    with pytest.raises(IntegrityError):
        site.log_in(client)
    assert client.get("/").text == "first"
    provider.access_token = "second"
    assert site.log_in(client).status_code == 302
    assert client.get("/").text == "second"


def test_a_token_is_deleted_by_one_statement(
    new_site: Callable[..., Site], wire: WireProxy
) -> None:
    site = new_site()
    client = site.app.test_client()
    site.log_in(client)
    with site.app.test_request_context(), wire.record() as recording:
        del site.blueprint.token
    assert sent(recording) == ["DELETE flask_dance_oauth"]
    assert client.get("/").text == "nobody"


def test_a_user_and_its_token_are_stored_together(
    new_site: Callable[..., Site], wire: WireProxy, provider: Provider
) -> None:
    site = new_site()
    session = site.db.session

    @oauth_authorized.connect_via(site.blueprint)
    def store(blueprint: OAuth2ConsumerBlueprint, token: dict[str, Any]) -> bool:
        with session.begin():
            user = site.User(name="Ada")
            session.add(site.OAuth(provider=blueprint.name, token=token, user=user))
        return False  # Flask-Dance is to store nothing

    client = site.app.test_client()
    provider.access_token = "long" * 99
    with pytest.raises(IntegrityError):
        site.log_in(client)
    provider.access_token = "first"
    with wire.record() as recording:
        site.log_in(client)
    assert sent(recording) == ["BEGIN", "INSERT users", "INSERT flask_dance_oauth", "COMMIT"]
    with site.app.app_context():
        assert session.query(site.User).count() == session.query(site.OAuth).count() == 1


def test_flask_dances_commit_in_an_atomic_request_is_refused(
    new_site: Callable[..., Site],
) -> None:
    site = new_site()
    site.db.atomic_requests(site.app, methods=["GET"])
    client = site.app.test_client()
    with pytest.raises(InvalidRequestError, match=r"leave commit\(\) out"):
        site.log_in(client)
    assert client.get("/").text == "nobody"
