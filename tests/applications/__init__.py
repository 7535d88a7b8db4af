"""The suites of real applications, with this package's class in the place of Flask-SQLAlchemy's.

``python -m tests.applications`` installs each application of :mod:`.table` into a virtual
environment of its own and runs the tests of its sdist three times, on an embedded PostgreSQL:

- ``stock``: with ``flask_sqlalchemy.SQLAlchemy``, as it is;
- ``begin_on_write``: with our class and ``session_options={"begin_on_write": True}``;
- ``strict``: with our class and no option.

It prints how many tests passed, and each test that differs. What passes with stock has to pass with
ours, except the tests in :mod:`.exceptions`; one that is listed there and passes is an error, too.
"""
