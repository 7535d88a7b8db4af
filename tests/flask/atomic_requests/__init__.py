"""A request is one transaction, which the status of its response ends: checked on the wire.

Each test runs with Flask-SQLAlchemy, with plain SQLAlchemy and our session, and with plain
SQLAlchemy and its own session, unless it says otherwise.
"""
