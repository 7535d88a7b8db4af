"""Tests that pass with stock and fail with ours, and why: the one place where they are listed.

A test that is listed and passes, does not exist or fails with stock, too, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

_CUT = (
    "it expects an error, because an earlier command has cut the connection with DROP"
    " DATABASE; ours notices that it is closed, and connects again"
)
_LEFT = "it finds the tables that the test before it leaves behind when it fails"
_SAVEPOINT = (
    "it expects `rollback()` to undo a `begin_nested()` before it, which in the strict mode"
    " is a transaction, stored at its end"
)
_VERSIONS = (
    "it counts the versions of a record that two `begin_nested()` blocks have changed before"
    " `commit()`. In the strict mode each of these blocks is a transaction of its own, of which"
    " SQLAlchemy-Continuum makes a version"
)
_NOT_FOUND = (
    "it adds or changes a file, and before `commit()` it looks for it with a query. In the strict"
    " mode a query does not flush, so it does not find what waits for `commit()`"
)
_STILL_COUNTED = (
    "it deletes an object, and before `commit()` it counts what is left. In the strict mode a query"
    " does not flush, so the object is still counted"
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
