"""A flush makes the row of a new object."""

# mypy: disable-error-code="misc"

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from fictive_sqlalchemy import OptInSession
from tests.find_or_create.models import (
    Ask,
    Assignee,
    Author,
    Doc,
    Novel,
    Pair,
    Rows,
    Slot,
    Ticket,
    anywhere,
    both,
)
from tests.wire import WireProxy


@both
def test_a_relationship_does_not_set_a_column_that_only_its_join_names(
    session: OptInSession, ask: Ask, rows: Rows, where: str
) -> None:
    of_one, _ = ask(Assignee, {"tenant_id": 1}, id=1)
    with anywhere(session, where):
        with pytest.raises(exc.IntegrityError, match="foreign key"):
            ask(Ticket, {"assignee": of_one}, tenant_id=2, number=9)
        assert ask(Ticket, {"assignee": of_one}, tenant_id=1, number=9)[1]
    assert rows("SELECT tenant_id, assignee_id FROM tickets") == [(1, 1)]


@both
def test_a_default_that_reads_another_column_works_as_in_a_flush(
    session: OptInSession, ask: Ask, where: str
) -> None:
    with anywhere(session, where):
        assert ask(Slot, name="a")[0].shown is None
        assert ask(Slot, {"nickname": "n"}, name="b")[0].shown == "n"


@both
@pytest.mark.parametrize(
    "name", ["python", "server", "unknown", "json", "jsonb", "upper", "other_python"]
)
def test_none_in_the_filters_is_null_in_the_search_and_in_the_row(
    session: OptInSession,
    ask: Ask,
    wire: WireProxy,
    rows: Rows,
    where: str,
    name: str,
) -> None:
    with anywhere(session, where):
        slot, created = ask(Slot, name="a", **{name: None})
        assert created
        with wire.record() as recording:
            assert getattr(slot, name) is None
        assert recording.verbs == []
        assert ask(Slot, name="a", **{name: None}) == (slot, False)
        assert not session.dirty
    column = "python" if name == "other_python" else name
    assert rows(f'SELECT "{column}" IS NULL FROM slots') == [True]


def test_none_in_a_composite_of_the_filters_is_null(ask: Ask, rows: Rows) -> None:
    slot, created = ask(Slot, name="a", pair=Pair(1, None))
    assert (slot.left, slot.right, created) == (1, None, True)
    assert rows('SELECT "left", "right" FROM slots') == [(1, None)]


@both
def test_functions_among_the_defaults_are_called_for_a_new_object_alone(
    session: OptInSession, ask: Ask, where: str
) -> None:
    calls: list[str] = []

    def make() -> str:
        calls.append("made")
        return "made"

    with anywhere(session, where):
        doc, created = ask(Doc, {"note": make}, title="menu")
        assert (doc.note, created) == ("made", True)
        assert ask(Doc, {"note": make}, title="menu") == (doc, False)
        now, _ = ask(Doc, {"note": sa.func.current_user}, title="expression")
        assert now.note == "postgres"
    assert calls == ["made"]


def test_a_function_may_return_a_related_object_that_is_stored(ask: Ask) -> None:
    ada, _ = ask(Author, name="Ada")
    assert ask(Novel, {"author": lambda: ada}, title="One")[0].author is ada
    with pytest.raises(exc.InvalidRequestError, match="not stored yet"):
        ask(Novel, {"author": lambda: Author(name="new")}, title="Two")
    with pytest.raises(exc.ArgumentError, match=r"Novel\.author is a Author or None, not 7"):
        ask(Novel, {"author": lambda: 7}, title="Two")


def test_an_error_of_a_function_leaves_nothing_behind(session: OptInSession, ask: Ask) -> None:
    with pytest.raises(ZeroDivisionError):
        ask(Doc, {"note": lambda: 1 / 0}, title="menu")
    assert (list(session), session.in_transaction()) == ([], False)


@both
def test_a_trigger_that_stores_the_row_elsewhere_is_an_error_of_the_flush(
    session: OptInSession, ask: Ask, rows: Rows, where: str
) -> None:
    rows(
        "CREATE FUNCTION elsewhere() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN INSERT INTO audits (what) VALUES (NEW.title); RETURN NULL; END';"
        "CREATE TRIGGER elsewhere BEFORE INSERT ON docs FOR EACH ROW EXECUTE FUNCTION elsewhere()"
    )
    with pytest.raises(exc.SQLAlchemyError), anywhere(session, where):
        ask(Doc, title="menu")
    # Outside, the one statement has succeeded for the server, so what the trigger did stays.
    audits = [] if where == "inside" else ["menu"]
    assert (list(session), rows("SELECT what FROM audits")) == ([], audits)
