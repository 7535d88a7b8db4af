"""Tests that pass with stock and fail with ours, and why: the one place where they are listed.

A test that is listed and passes, does not exist or fails with stock, too, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

_CUT = (
    "the test expects an error, because an earlier command has cut the connection with DROP"
    " DATABASE. This package notices that the connection is closed, and connects again"
)
_LEFT = "the test finds the tables that the previous test leaves behind when that test fails"
_SAVEPOINT = (
    "the test expects `rollback()` to undo an earlier `begin_nested()` block. In the strict mode"
    " this block is a transaction, which is stored at its end"
)
_VERSIONS = (
    "the test counts the versions of a record that two `begin_nested()` blocks have changed before"
    " `commit()`. In the strict mode each of these blocks is a transaction of its own, and"
    " SQLAlchemy-Continuum makes a version for each transaction"
)
_NOT_FOUND = (
    "a file is added or changed, and a query looks for the file before `commit()`. In the strict"
    " mode a query does not flush, so the query does not find the pending change"
)
_STILL_COUNTED = (
    "an object is deleted, and a query counts the remaining objects before `commit()`. In the"
    " strict mode a query does not flush, so the deleted object is still counted"
)

#: For each application, for each mode: the name of the test, and the reason.
EXCEPTIONS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "invenio-db": {
        "begin_on_write": {"tests/test_db.py::test_entry_points": _CUT},
        "strict": {
            "tests/test_db.py::test_entry_points": _CUT,
            "tests/test_db.py::test_db_create_alembic_upgrade": _LEFT,
            "tests/test_db.py::test_transaction": _SAVEPOINT,
        },
    },
    "invenio-accounts": {
        "strict": {"tests/test_models.py::test_session_activity_model": _STILL_COUNTED},
    },
    "invenio-records": {
        "strict": {"tests/test_api.py::test_retrieve_proper_revision": _VERSIONS},
    },
    "invenio-files-rest": {
        "strict": {
            "tests/test_models.py::test_bucket_sync_same_object": _NOT_FOUND,
            "tests/test_models.py::test_object_delete": _NOT_FOUND,
            "tests/test_models.py::test_object_restore": _NOT_FOUND,
            "tests/test_models.py::test_object_snapshot": _NOT_FOUND,
        },
    },
    "flaskbb": {
        "strict": {"tests/unit/test_forum_models.py::test_post_delete": _STILL_COUNTED},
    },
}
