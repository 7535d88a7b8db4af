"""A view may read, write, set savepoints and roll back in the transaction of its request."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Response
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import IntegrityError, InvalidRequestError

from tests.flask.atomic_requests.support import UNDONE, WRITTEN, House, post
from tests.library import Author, Onlooker, sent
from tests.wire import WireProxy


def test_begin_inside_points_at_savepoints(house: House, onlooker: Onlooker) -> None:
    house.web.testing = True

    @house.web.post("/")
    def view() -> str:
        house.add()
        with house.session.begin():
            raise AssertionError("never comes here")

    message = "already begun" if house.kind == "stock" else r"already begun.*begin_nested\(\)"
    with pytest.raises(InvalidRequestError, match=message):
        post(house)
    assert onlooker.names() == []


def test_savepoints_in_a_request_are_undone_alone(
    house: House, wire: WireProxy, onlooker: Onlooker
) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add("one")
        with suppress(IntegrityError), house.session.begin_nested():
            house.add("Ada")
        with house.session.begin_nested():
            house.add("two")
        return "stored"

    with wire.record() as recording:
        assert post(house) == (200, "stored")
    assert sent(recording) == [
        "BEGIN",
        "INSERT",
        *("SAVEPOINT", "INSERT", "ROLLBACK TO"),
        *("SAVEPOINT", "INSERT", "RELEASE"),
        "COMMIT",
    ]
    assert onlooker.names() == ["one", "two"]


def test_a_savepoint_that_nobody_ended_commits(house: House, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> str:
        house.session.begin_nested()
        house.add()
        return "stored"

    assert post(house) == (200, "stored")
    assert onlooker.names() == ["new"]


@pytest.mark.parametrize("where", ["session", "transaction", "savepoint"])
def test_commit_is_refused_before_anything_is_committed(
    house: House, wire: WireProxy, onlooker: Onlooker, where: str
) -> None:
    house.web.testing = True

    @house.web.post("/")
    def view() -> str:
        house.add()
        if where == "session":
            house.session.commit()
        elif where == "transaction":
            transaction = house.session().get_transaction()
            assert transaction
            transaction.commit()
        else:
            with house.session.begin_nested():
                house.session.commit()
        return "never"

    with (
        wire.record() as recording,
        pytest.raises(InvalidRequestError, match=r"leave commit\(\) out.*non_atomic_request"),
    ):
        post(house)
    assert "COMMIT" not in sent(recording)
    assert sent(recording)[-1] == "ROLLBACK"
    assert onlooker.names() == []


def test_after_a_refused_commit_the_request_goes_on(house: House, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add("one")
        with pytest.raises(InvalidRequestError):
            house.session.commit()
        house.add("two")
        assert onlooker.names() == []
        return ""

    assert post(house)[0] == 200
    assert onlooker.names() == ["one", "two"]


@pytest.mark.parametrize(("status", "stored"), [(200, ["after"]), (409, [])])
def test_rollback_undoes_and_the_request_goes_on_in_a_new_transaction(
    house: House, wire: WireProxy, onlooker: Onlooker, status: int, stored: list[str]
) -> None:
    @house.web.post("/")
    def view() -> tuple[str, int]:
        house.add("before")
        house.session.add(Author(name="pending"))
        house.session.rollback()
        with pytest.raises(InvalidRequestError, match="already begun"):
            house.session.begin()
        house.add("after")
        with pytest.raises(InvalidRequestError, match="leave commit"):
            house.session.commit()
        assert onlooker.names() == []
        return "", status

    with wire.record() as recording:
        assert post(house)[0] == status
    assert sent(recording) == [*UNDONE, *(WRITTEN if stored else UNDONE)]
    assert onlooker.names() == stored


@pytest.mark.parametrize("how", ["flush", "statement"])
def test_a_form_may_be_shown_again_after_an_integrity_error(
    house: House, wire: WireProxy, onlooker: Onlooker, how: str
) -> None:
    @house.web.post("/")
    def view() -> ResponseReturnValue:
        house.add("before")
        try:
            if how == "flush":
                house.add("Ada")
            else:
                house.session.execute(sa.insert(Author).values(name="Ada"))
        except IntegrityError:
            house.session.rollback()
            author = house.session.get(Author, 1)
            assert author
            return f"{author.name} is taken"
        return "stored"

    with wire.record() as recording:
        assert post(house) == (200, "Ada is taken")
    assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "ROLLBACK", "BEGIN", "SELECT", "COMMIT"]
    assert onlooker.names() == []


def test_an_error_handler_that_rolls_back_may_read(house: House, wire: WireProxy) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add("Ada")
        return "never"

    @house.web.errorhandler(IntegrityError)
    def handle(error: IntegrityError) -> tuple[str, int]:
        house.session.rollback()
        author = house.session.get(Author, 1)
        assert author
        return f"{author.name} is taken", 409

    with wire.record() as recording:
        assert post(house) == (409, "Ada is taken")
    assert sent(recording) == [*UNDONE, "BEGIN", "SELECT", "ROLLBACK"]


@pytest.mark.parametrize("call", ["close", "remove", "reset", "invalidate"])
def test_a_session_that_was_ended_inside_is_no_200(
    house: House, onlooker: Onlooker, call: str
) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add()
        getattr(house.session() if call == "invalidate" else house.session, call)()
        return "stored"

    @house.web.errorhandler(InvalidRequestError)
    def handle(error: Exception) -> tuple[str, int]:
        return str(error), 500

    status, text = post(house)
    assert status == 500
    if call == "remove" and house.kind != "stock":
        assert "nothing of it is stored. Leave" in text
    else:
        assert "Nothing of this request is stored" in text
        assert "Leave that call out" in text
    assert onlooker.names() == []


@pytest.mark.parametrize(
    "then", ["execute", "flush", "commit", "nothing", "bulk", "connection", "begin"]
)
@pytest.mark.parametrize("call", ["close", "remove", "rollback in a savepoint"])
def test_nothing_is_stored_on_its_own_after_the_session_was_ended_inside(
    house: House, onlooker: Onlooker, call: str, then: str
) -> None:
    if house.kind == "stock" and (call, then) == ("remove", "commit"):
        pytest.skip("A session of SQLAlchemy's own that is new, and committed by hand.")

    @house.web.post("/")
    def view() -> str:
        house.add("new")
        if call == "close":
            house.session.close()
        elif call == "remove":
            house.session.remove()
        else:
            with suppress(InvalidRequestError), house.session.begin_nested():
                house.session.rollback()
        with suppress(InvalidRequestError):
            if then == "execute":
                house.session.execute(sa.insert(Author).values(name="later"))
            elif then == "flush":
                house.add("later")
            elif then == "commit":
                house.session.add(Author(name="later"))
                house.session.commit()
            elif then == "bulk":
                house.session.bulk_save_objects([Author(name="later")])
            elif then == "connection":
                insert = sa.insert(Author).values(name="later")
                house.session.connection().execute(insert)
            elif then == "begin" and house.kind != "stock":
                with house.session.begin():
                    house.session.add(Author(name="later"))
        return "stored"

    assert post(house)[0] == 500
    assert onlooker.names() == []


def test_reads_of_a_request_are_in_its_transaction(house: House, wire: WireProxy) -> None:
    @house.web.post("/")
    def view() -> str:
        author = house.session.get(Author, 1, with_for_update=True)
        assert author
        author.age = 31
        return author.name

    with wire.record() as recording:
        assert post(house) == (200, "Ada")
    assert sent(recording) == ["BEGIN", "SELECT", "UPDATE", "COMMIT"]


def test_atomic_blocks_are_savepoints(opt_in: House, wire: WireProxy, onlooker: Onlooker) -> None:
    sessions: Any = opt_in.session

    @opt_in.web.post("/")
    def view() -> str:
        with sessions.atomic():
            opt_in.add("one")
        with suppress(IntegrityError), sessions.atomic():
            opt_in.add("Ada")
        return "stored"

    with wire.record() as recording:
        assert post(opt_in) == (200, "stored")
    assert sent(recording) == [
        *("BEGIN", "SAVEPOINT", "INSERT", "RELEASE"),
        *("SAVEPOINT", "INSERT", "ROLLBACK TO", "COMMIT"),
    ]
    assert onlooker.names() == ["one"]


def test_set_rollback_rolls_back_whatever_the_status(
    opt_in: House, wire: WireProxy, onlooker: Onlooker
) -> None:
    sessions: Any = opt_in.session

    @opt_in.web.post("/")
    def view() -> str:
        opt_in.add()
        sessions.set_rollback()
        return "a rehearsal"

    with wire.record() as recording:
        assert post(opt_in) == (200, "a rehearsal")
    assert sent(recording) == UNDONE
    assert onlooker.names() == []


@pytest.mark.parametrize(("status", "called"), [(200, ["commit"]), (409, ["rollback"])])
def test_functions_are_called_after_the_transaction_of_the_request(
    opt_in: House, onlooker: Onlooker, status: int, called: list[str]
) -> None:
    sessions: Any = opt_in.session
    calls: list[str] = []

    @opt_in.web.post("/")
    def view() -> tuple[str, int]:
        sessions.on_commit(lambda: calls.append("commit"))
        sessions.on_rollback(lambda: calls.append("rollback"))
        opt_in.add()
        return "", status

    @opt_in.web.after_request
    def after(response: Response) -> Response:
        assert calls == []
        return response

    assert post(opt_in)[0] == status
    assert calls == called


def test_an_error_after_the_commit_is_a_500_of_what_is_stored(
    opt_in: House, onlooker: Onlooker
) -> None:
    sessions: Any = opt_in.session

    def fail() -> None:
        raise ValueError

    @opt_in.web.post("/")
    def view() -> str:
        sessions.on_commit(fail)
        opt_in.add()
        return "stored"

    assert post(opt_in)[0] == 500
    assert onlooker.names() == ["new"]
