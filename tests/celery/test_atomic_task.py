"""A task that is atomic is one transaction."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from celery import states
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from flask import Flask, g
from sqlalchemy.exc import IntegrityError, InvalidRequestError, PendingRollbackError

from fictive_sqlalchemy.ext.celery import DatabaseTask
from tests.celery.tasks import Item, Seat, celery_of, db, items
from tests.flask.conftest import MakeApp
from tests.flask.support import Database
from tests.library import Onlooker
from tests.wire import WireProxy


class TestAtomic:
    @pytest.mark.parametrize(
        ("raised", "state"),
        [
            (ValueError("no"), states.FAILURE),
            (SoftTimeLimitExceeded(), states.FAILURE),
            (Ignore(), states.IGNORED),
            (Reject("no"), states.REJECTED),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_an_exception_rolls_back(
        self, task: Any, wire: WireProxy, onlooker: Onlooker, raised: Exception, state: str
    ) -> None:
        @task(atomic=True)
        def write() -> None:
            db.session.add(Item(name="new"))
            db.session.flush()
            raise raised

        with wire.record() as recording:
            assert write.apply().state == state
        assert recording.verbs == ["BEGIN", "INSERT", "ROLLBACK"]
        assert items(onlooker) == []

    @pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
    def test_an_interruption_rolls_back(
        self, task: Any, onlooker: Onlooker, raised: type[BaseException]
    ) -> None:
        @task(atomic=True)
        def write() -> None:
            db.session.add(Item(name="new"))
            db.session.flush()
            raise raised

        with pytest.raises(raised):
            write.apply()
        assert items(onlooker) == []

    def test_a_retry_rolls_back(self, task: Any, wire: WireProxy, onlooker: Onlooker) -> None:
        @task(atomic=True, bind=True)
        def write(self: Any) -> int:
            # The same name: the attempt before must not be in the way.
            db.session.add(Item(name="new"))
            db.session.flush()
            if self.request.retries < 2:
                raise self.retry(countdown=0)
            return int(self.request.retries)

        with wire.record() as recording:
            assert write.apply().get() == 2
        verbs = ["BEGIN", "INSERT", "ROLLBACK"] * 2 + ["BEGIN", "INSERT", "COMMIT"]
        assert [verb for verb in recording.verbs if verb != "DEALLOCATE"] == verbs
        assert items(onlooker) == ["new"]

    def test_an_attempt_is_rolled_back_before_it_is_made_again_by_autoretry_for(
        self, task: Any, onlooker: Onlooker
    ) -> None:
        @task(atomic=True, bind=True, autoretry_for=(ValueError,), retry_kwargs={"countdown": 0})
        def write(self: Any) -> None:
            db.session.add(Item(name=f"new {self.request.retries}"))
            db.session.flush()
            if self.request.retries == 0:
                raise ValueError

        assert write.apply().state == states.SUCCESS
        assert items(onlooker) == ["new 1"]

    def test_an_atomic_task_is_committed_before_there_is_a_result(
        self, app: Flask, onlooker: Onlooker
    ) -> None:
        seen: list[list[str]] = []

        class Looking(DatabaseTask):
            def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
                seen.append(items(onlooker))

        @celery_of(Looking.of(app)).task(atomic=True, shared=False)
        def write() -> None:
            db.session.add(Item(name="new"))

        write.apply()
        assert seen == [["new"]]

    def test_a_commit_that_fails_is_a_failure(self, task: Any, onlooker: Onlooker) -> None:
        onlooker.run("INSERT INTO seat (place) VALUES (1)")

        @task(atomic=True)
        def sit() -> None:
            db.session.add_all([Item(name="new"), Seat(place=1)])

        result = sit.apply()
        assert result.state == states.FAILURE
        assert isinstance(result.result, IntegrityError)
        assert items(onlooker) == []

    def test_a_commit_that_fails_is_retried(self, task: Any, onlooker: Onlooker) -> None:
        onlooker.run("INSERT INTO seat (place) VALUES (1)")

        @task(
            atomic=True,
            bind=True,
            autoretry_for=(IntegrityError,),
            retry_kwargs={"countdown": 0},
        )
        def sit(self: Any) -> int:
            place = 1 + int(self.request.retries)
            db.session.add_all([Item(name=f"new {place}"), Seat(place=place)])
            return place

        assert sit.apply().get() == 2
        assert items(onlooker) == ["new 2"]
        assert onlooker.column("SELECT place FROM seat ORDER BY place") == [1, 2]

    def test_a_statement_that_failed_and_was_caught_is_a_failure(
        self, task: Any, onlooker: Onlooker
    ) -> None:
        @task(atomic=True)
        def write() -> str:
            db.session.add(Item(name="new"))
            db.session.flush()
            try:
                db.session.execute(sa.insert(Item).values(name="one"))
            except IntegrityError:
                return "it was there"
            return "it is new"

        result = write.apply()
        assert isinstance(result.result, PendingRollbackError)
        assert items(onlooker) == []

    def test_what_may_fail_goes_into_a_savepoint(self, task: Any, onlooker: Onlooker) -> None:
        @task(atomic=True)
        def write() -> None:
            db.session.add(Item(name="new"))
            with pytest.raises(IntegrityError), db.session.begin_nested():
                db.session.add(Item(name="one"))
            with db.session.begin_nested():
                db.session.add(Item(name="newer"))

        assert write.apply().state == states.SUCCESS
        assert items(onlooker) == ["new", "newer"]

    def test_a_commit_inside_is_refused(
        self, task: Any, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        @task(atomic=True)
        def write() -> None:
            db.session.add(Item(name="new"))
            db.session.commit()

        with wire.record() as recording:
            result = write.apply()
        with pytest.raises(InvalidRequestError, match=r"committed when it returns.*leave commit"):
            result.get()
        assert recording.verbs == []

    @pytest.mark.parametrize("end", ["rollback", "close", "remove"])
    def test_a_success_that_is_not_stored_is_a_failure(
        self, task: Any, onlooker: Onlooker, end: str
    ) -> None:
        @task(atomic=True)
        def write() -> None:
            db.session.add(Item(name="new"))
            db.session.flush()
            getattr(db.session, end)()

        message = "ended its own transaction.*begin_nested"
        if end == "remove":
            message = "nothing of it is stored"
        with pytest.raises(InvalidRequestError, match=message):
            write.apply().get()
        assert items(onlooker) == []

    def test_set_rollback_rolls_back_a_success(self, task: Any, onlooker: Onlooker) -> None:
        @task(atomic=True)
        def write() -> str:
            db.session.add(Item(name="new"))
            db.session.flush()
            db.session.set_rollback()
            return "nothing to do"

        assert write.apply().get() == "nothing to do"
        assert items(onlooker) == []

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_task_can_be_sent_on_commit(self, task: Any, onlooker: Onlooker, fails: bool) -> None:
        seen: list[list[str]] = []

        @task()
        def look() -> None:
            seen.append(items(onlooker))

        @task(atomic=True)
        def write() -> None:
            db.session.on_commit(look.apply)
            db.session.add(Item(name="new"))
            if fails:
                raise ValueError

        write.apply()
        assert seen == ([] if fails else [["new"]])

    def test_begin_inside_points_at_begin_nested(self, task: Any) -> None:
        @task(atomic=True)
        def write() -> None:
            with db.session.begin():
                pass

        with pytest.raises(InvalidRequestError, match="begin_nested"):
            write.apply().get()

    def test_a_task_called_in_another_one_is_a_transaction_of_its_own(
        self, task: Any, onlooker: Onlooker
    ) -> None:
        @task(atomic=True)
        def inner() -> int:
            db.session.add(Item(name="inner"))
            return int(db.session.scalar(sa.select(sa.func.count(Item.id))))

        @task(atomic=True)
        def outer() -> None:
            db.session.add(Item(name="outer"))
            db.session.flush()
            assert inner() == 2  # it does not see what is not committed
            raise ValueError

        assert outer.apply().state == states.FAILURE
        assert items(onlooker) == ["inner"]

    def test_parts_of_a_task_that_is_not_atomic_may_be_transactions(
        self, task: Any, onlooker: Onlooker
    ) -> None:
        @task()
        def write() -> None:
            with db.session.begin():
                db.session.add(Item(name="stored"))
            with db.session.begin():
                db.session.add(Item(name="lost"))
                db.session.flush()
                raise ValueError

        assert write.apply().state == states.FAILURE
        assert items(onlooker) == ["stored"]

    def test_all_tasks_of_a_class_may_be_atomic(self, app: Flask, onlooker: Onlooker) -> None:
        class Atomic(DatabaseTask):
            atomic = True

        celery = celery_of(Atomic.of(app))

        @celery.task(shared=False)
        def write() -> None:
            db.session.add(Item(name="new"))

        @celery.task(shared=False, atomic=False)
        def write_nothing() -> None:
            db.session.add(Item(name="pending"))

        write.apply()
        write_nothing.apply()
        assert items(onlooker) == ["new"]

    def test_the_function_of_local_settings_is_called_after_the_task_has_found_the_tenant(
        self, make_app: MakeApp, url: str
    ) -> None:
        tenants: Any = Database()
        app = make_app(tenants, url)

        @tenants.local_settings
        def tenant() -> dict[str, int] | None:
            return {"app.tenant_id": g.tenant} if "tenant" in g else None

        @celery_of(DatabaseTask.of(app)).task(atomic=True, shared=False)
        def read(tenant: int) -> Any:
            g.tenant = tenant
            return tenants.session.scalar(sa.text("SELECT current_setting('app.tenant_id', true)"))

        assert [read.apply((number,)).get() for number in (7, 8)] == ["7", "8"]
