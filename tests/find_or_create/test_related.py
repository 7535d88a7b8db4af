"""What waits in the session, and related objects, around a new object."""

# mypy: disable-error-code="misc"

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from sqlalchemy import exc
from sqlalchemy.orm import (
    object_session,
)

from fictive_sqlalchemy import OptInSession
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from tests.find_or_create.models import (
    Ask,
    Audit,
    Author,
    Doc,
    Essay,
    Label,
    Late,
    Note,
    Novel,
    Poem,
    Portrait,
    Rows,
    Work,
    listening,
)
from tests.wire import Message, WireProxy

WORKS = {"novels": Novel, "essays": Essay, "poems": Poem, "portrait": Portrait}


def of(author: Author, name: str) -> list[Any]:
    """Read a relationship, of whatever kind."""
    if name == "poems":
        session = object_session(author)
        assert session is not None
        return list(session.scalars(author.poems.select()))
    value = getattr(author, name)
    return [value] if isinstance(value, Work) else list(value or ())


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("is_waiting", [False, True])
@pytest.mark.parametrize("name", WORKS)
def test_a_related_object_gets_the_new_object_once(
    session: OptInSession,
    ask: Ask,
    wire: WireProxy,
    rows: Rows,
    name: str,
    is_waiting: bool,
    is_loaded: bool,
) -> None:
    ada, _ = ask(Author, name="Ada")
    if is_loaded:
        assert of(ada, name) == []
    if is_waiting:
        ada.mood = "bad"
    with wire.record() as recording:
        work, created = ask(WORKS[name], author=ada, title="One")
    assert created
    # To store the portrait with its author, the flush reads which one she had before.
    is_one_statement = name != "portrait" or is_waiting
    assert [verb for verb in recording.verbs if verb != "SELECT"] == (
        ["INSERT"] if is_one_statement else ["BEGIN", "INSERT", "COMMIT"]
    )
    assert list(session.dirty) == ([ada] if is_waiting else [])
    assert (of(ada, name), work.author) == ([work], ada)
    session.commit()
    assert of(ada, name) == [work]
    assert rows("SELECT mood, version FROM writers") == [("bad", 2) if is_waiting else (None, 1)]


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("is_waiting", [False, True])
@pytest.mark.parametrize("name", WORKS)
def test_a_failed_attempt_leaves_no_trace_in_a_related_object(
    session: OptInSession,
    ask: Ask,
    rows: Rows,
    name: str,
    is_waiting: bool,
    is_loaded: bool,
) -> None:
    ada, _ = ask(Author, name="Ada")
    if is_loaded:
        assert of(ada, name) == []
    if is_waiting:
        ada.mood = "bad"
    with pytest.raises(exc.DataError):
        ask(WORKS[name], {"id": 2**40}, author=ada, title="One")
    assert list(session.dirty) == ([ada] if is_waiting else [])
    assert (list(session.new), ada.mood) == ([], "bad" if is_waiting else None)
    assert of(ada, name) == []
    session.commit()
    assert of(ada, name) == []
    assert rows(f"SELECT count(*) FROM {WORKS[name].__tablename__}") == [0]
    assert rows("SELECT mood FROM writers") == ["bad" if is_waiting else None]


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("is_waiting", [False, True])
def test_many_to_many_is_stored_once_by_a_constructor_that_adds_to_the_session(
    session: OptInSession,
    ask: Ask,
    rows: Rows,
    is_waiting: bool,
    is_loaded: bool,
) -> None:
    label, _ = ask(Label, name="new")
    if is_loaded:
        assert label.notes == []
    if is_waiting:
        label.color = "red"
    ask(Note, {"text": "taken"}, key="0")
    with pytest.raises(exc.IntegrityError):
        ask(Note, {"label": label, "text": "taken"}, key="1")
    assert list(session.new) == []
    note, created = ask(Note, {"label": label}, key="1")
    assert created
    assert (label.notes, note.labels) == ([note], [label])
    session.commit()
    assert rows("SELECT label, note FROM label_notes") == [("new", "1")]
    assert rows("SELECT color FROM labels") == ["red" if is_waiting else None]


def test_other_members_of_a_collection_go_on_waiting(
    session: OptInSession, ask: Ask, rows: Rows
) -> None:
    ada, _ = ask(Author, name="Ada")
    waiting = Novel(title="waiting", author=ada)
    session.add(waiting)
    novel, created = ask(Novel, author=ada, title="One")
    assert created
    assert rows("SELECT title FROM novels") == ["One"]
    with pytest.raises(exc.DataError):
        ask(Novel, {"id": 2**40}, author=ada, title="Two")
    assert list(session.new) == [waiting]
    assert sorted(work.title for work in ada.novels) == ["One", "waiting"]
    session.commit()
    assert sorted(rows("SELECT title FROM novels")) == ["One", "waiting"]
    assert novel in ada.novels


def test_what_a_constructor_changes_is_stored_with_it_and_undone_with_it(
    session: OptInSession, ask: Ask, rows: Rows
) -> None:
    ada, _ = ask(Author, name="Ada")

    def count(target: Novel, args: Any, kwargs: Any) -> None:
        ada.count += 1

    with listening(Novel, "init", count):
        with pytest.raises(exc.DataError):
            ask(Novel, {"id": 2**40}, author=ada, title="One")
        assert (ada.count, list(session.dirty)) == (0, [])
        assert ask(Novel, author=ada, title="One")[1]
    assert rows("SELECT count FROM writers") == [1]


def test_an_object_of_no_session_is_let_go_again_after_a_failure(
    session: OptInSession, ask: Ask
) -> None:
    ada, _ = ask(Author, name="Ada")
    session.expunge(ada)
    with pytest.raises(exc.DataError):
        ask(Novel, {"id": 2**40}, author=ada, title="One")
    assert list(session) == []
    assert ask(Novel, author=ada, title="One")[0].author is ada
    assert ada in session


def test_an_object_of_another_session_is_refused(
    session: OptInSession, ask: Ask, maker: Callable[[], OptInSession]
) -> None:
    with maker() as other:
        ada, _ = filter_by_or_create(other, Author, {"name": "Ada"}, {})
        with pytest.raises(exc.InvalidRequestError, match="already attached"):
            ask(Novel, author=ada, title="One")
        assert (list(session), ada in other) == ([], True)


@pytest.mark.parametrize("fails", ["never", "in the flush", "at COMMIT", "in a listener"])
@pytest.mark.parametrize("autoflush", [True, False])
@pytest.mark.parametrize("expire_on_commit", [True, False])
def test_all_that_waits_goes_on_waiting(
    session: OptInSession,
    ask: Ask,
    wire: WireProxy,
    rows: Rows,
    fails: str,
    autoflush: bool,
    expire_on_commit: bool,
) -> None:
    session.autoflush, session.expire_on_commit = autoflush, expire_on_commit
    old, _ = ask(Late, {"key": "old"}, code="old")
    gone, _ = ask(Late, {"key": "gone"}, code="gone")
    audit, _ = ask(Audit, what="kept")
    old.key = "new"
    session.delete(gone)
    waiting = Late(key="waiting", code="waiting")
    session.add(waiting)
    by_failure: dict[str, dict[str, Any]] = {
        "never": {"code": "free"},
        "in the flush": {"id": 2**40},
        "at COMMIT": {"code": "old"},
        "in a listener": {},
    }
    defaults = by_failure[fails]

    def change(session: OptInSession, *args: Any) -> None:
        for instance in session.new:
            if instance is not waiting:
                session.add(Audit(what="added"))
                session.delete(audit)
        if fails == "in a listener":
            raise ZeroDivisionError

    with (
        listening(session, "before_flush", change),
        pytest.raises((exc.DBAPIError, ZeroDivisionError)) if fails != "never" else nullcontext(),
        wire.record() as recording,
    ):
        ask(Late, defaults, key="asked")
    assert recording.verbs.count("UPDATE") == 0
    assert (set(session.new), set(session.dirty), set(session.deleted)) == (
        {waiting},
        {old},
        {gone},
    )
    assert (old.key, waiting.key, session.in_transaction()) == ("new", "waiting", False)
    assert (audit in session) is (fails != "never")
    assert rows("SELECT what FROM audits") == (["added"] if fails == "never" else ["kept"])
    if fails != "never":
        assert (len(list(session)), audit.what) == (4, "kept")
    session.commit()
    keys = rows("SELECT key FROM late_ones ORDER BY key")
    assert keys == (["asked"] if fails == "never" else []) + ["new", "waiting"]


def test_the_loser_at_commit_gets_what_the_winner_created(
    session: OptInSession, ask: Ask, wire: WireProxy, rows: Rows
) -> None:
    waiting = Doc(title="waiting")
    session.add(waiting)

    def look(message: Message) -> None:
        if message.is_statement and message.verb == "INSERT":
            wire.before_forward = None
            rows("INSERT INTO late_ones (key, code) VALUES ('k', 'c')")

    wire.before_forward = look
    # Somebody listens to the COMMIT, so there is one.
    with listening(session, "before_commit", lambda session: None), wire.record() as recording:
        late, created = ask(Late, code="c", key="k")
    assert not created
    assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT", "SELECT"]
    assert (list(session.new), late in session) == ([waiting], True)
    assert rows("SELECT id FROM late_ones") == [late.id]
