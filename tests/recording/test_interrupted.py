"""Exceptions from a signal handler at any line of a recorder: nothing is lost without a word."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy.guarding import Guard
from fictive_sqlalchemy.recording import record
from fictive_sqlalchemy.reporting import Reporter
from tests.core.test_interruptions import OF_CONNECTION, OF_SESSION, Tries
from tests.interruptions import HardStop, SoftLimit
from tests.library import Onlooker
from tests.wire import WireProxy


class RecordedTries(Tries):
    """Interrupts a call that is recorded, reported and guarded."""

    def _try(self, interruption: Any, make: Any, call: Any) -> None:
        engine = self.engine
        with (
            record(engine, keep=1),
            Guard("log", engine),
            Reporter(engine, slow_transaction=None) as reporter,
            reporter.unit("test"),
        ):
            super()._try(interruption, make, call)


@pytest.fixture
def tries(engine: OptInEngine, onlooker: Onlooker, wire: WireProxy) -> RecordedTries:
    return RecordedTries(engine, onlooker, wire)


# psycopg warns of the cursor of a stream that was interrupted before anybody had it.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestInterruptionOfWhatIsRecorded:
    @pytest.mark.parametrize(
        "call", ["a block", "begin_nested", "a block with one object", "a stream"]
    )
    @pytest.mark.parametrize("begin_on_write", [False, True])
    def test_an_interruption_of_a_session_that_is_recorded_stores_no_part(
        self, tries: Tries, call: str, begin_on_write: bool
    ) -> None:
        sessions = sessionmaker(tries.engine, class_=OptInSession, begin_on_write=begin_on_write)
        # SQLAlchemy logs an Exception that comes while it closes a cursor.
        exception = HardStop if call == "a stream" else SoftLimit
        tries.run(sessions, OF_SESSION[call], exception)

    @pytest.mark.parametrize("call", ["a block", "rollback", "one statement"])
    def test_an_interruption_of_a_connection_that_is_recorded_stores_no_part(
        self, tries: Tries, call: str
    ) -> None:
        tries.run(tries.engine.connect, OF_CONNECTION[call], SoftLimit)
