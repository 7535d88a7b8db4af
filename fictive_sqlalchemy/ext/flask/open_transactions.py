"""``flask db-transactions``: which transactions are open on the server now, the longest first."""

from __future__ import annotations

from typing import Any

import click
from flask import Flask, current_app
from flask.cli import with_appcontext
from sqlalchemy import text
from sqlalchemy.engine import Engine, Row

from ..._core.errors import see

_COMMAND = "db-transactions"

# https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-PG-STAT-ACTIVITY-VIEW
_OPEN = text("""
SELECT
    extract(epoch FROM clock_timestamp() - xact_start)::float AS seconds,
    extract(epoch FROM clock_timestamp() - state_change)::float AS in_state,
    state, application_name, usename, host(client_addr) AS client, pid, query,
    wait_event_type || ': ' || wait_event AS waits_for,
    pg_blocking_pids(pid) AS blocked_by
FROM pg_stat_activity
WHERE xact_start IS NOT NULL AND backend_type = 'client backend' AND datname = current_database()
    AND pid <> pg_backend_pid()
    AND application_name = coalesce(CAST(:application AS text), application_name)
    AND clock_timestamp() - xact_start >= make_interval(secs => CAST(:seconds AS float))
ORDER BY xact_start
""")


def add_command(app: Flask) -> None:
    """Add the command to an application, unless it has one of this name.

    :param app: The application.
    """
    if _COMMAND not in app.cli.commands:
        app.cli.add_command(print_transactions)


@click.command(_COMMAND)
@click.option("--application", help="Show only transactions with this application_name")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Show only transactions that have been open for at least this many seconds",
)
@click.option(
    "--bind", "bind_key", help="The key of the bind to ask; the default bind if it is left out"
)
@with_appcontext
def print_transactions(application: str | None, seconds: float, bind_key: str | None) -> None:
    """Print the transactions that are open on the server now, the longest first.

    It reads pg_stat_activity, where the transactions of other users are shown only to a superuser
    or a member of pg_read_all_stats. A statement outside a transaction is listed while it runs.
    """
    engines: dict[str | None, Engine] = current_app.extensions["sqlalchemy"].engines
    if bind_key not in engines:
        names = ", ".join(sorted(key for key in engines if key is not None))
        instead = f"name one with --bind ({names})" if names else "leave --bind out"
        missing = "no default bind" if bind_key is None else f"no bind {bind_key!r}"
        raise click.UsageError(
            f"The application has {missing}: {instead}." + see("open-transactions-command")
        )
    engine = engines[bind_key]
    if engine.dialect.name != "postgresql":
        raise click.UsageError(
            f"{_COMMAND} asks PostgreSQL, and this bind is {engine.name}."
            + see("open-transactions-command")
        )
    with engine.connect() as connection:
        found = connection.execute(_OPEN, {"application": application, "seconds": seconds}).all()
    for row in found:
        click.echo(_line(row))
    count = f"{len(found)} transaction{'' if len(found) == 1 else 's'}"
    click.echo(f"{count} open." if found else "No transaction is open.")


def _line(row: Row[Any]) -> str:
    query = " ".join((row.query or "").split())
    parts = [
        f"{row.seconds:.1f} s",
        f"{row.state} for {row.in_state:.1f} s",
        row.application_name or "(no application_name)",
        f"{row.usename}@{row.client or 'local'}",
        f"pid {row.pid}",
    ]
    if row.state == "active" and row.waits_for:
        parts.append(f"waits for {row.waits_for}")
    if row.blocked_by:
        parts.append(f"blocked by pid {', '.join(map(str, row.blocked_by))}")
    return f"{'  '.join(parts)}\n    {query if len(query) <= 160 else query[:159] + '…'}"
