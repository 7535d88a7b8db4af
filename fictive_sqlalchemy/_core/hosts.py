"""URLs with several hosts, of which libpq takes the first one that answers and is as asked for.

See https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-MULTIPLE-HOSTS and
https://docs.sqlalchemy.org/en/21/dialects/postgresql.html#specifying-multiple-fallback-hosts
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import URL

from .autocommit import PSYCOPG
from .describe import listed

#: Which server a connection may go to.
#: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-TARGET-SESSION-ATTRS
TARGETS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")

# What no standby is.
_OF_THE_PRIMARY = ("read-write", "primary")

#: How to name several hosts, for errors.
FORMS = (
    "Name several hosts as in ?host=one:5432&host=two:5432, or as in ?host=one,two&port=5432,5432."
)


def check_hosts(url: URL, what: str = "The URL") -> None:
    """Refuse a URL whose hosts or ``target_session_attrs`` libpq would not understand.

    :param url: The URL.
    :param what: Whose URL it is, for the error.
    :raises sqlalchemy.exc.ArgumentError: if it is wrong. The text has no value of the URL but its
        hosts and its ``target_session_attrs``.
    """
    if url.get_backend_name() != "postgresql" or url.get_driver_name() not in PSYCOPG:
        return
    for host in _hosts(url, what):
        # A path is that of a Unix socket, and an IPv6 address has several colons.
        if host.count(":") == 1 and not host.startswith("/"):
            raise exc.ArgumentError(f"{what} has a host with a port, {host}, in a list. {FORMS}")
        if "[" in host:
            raise exc.ArgumentError(
                f"{what} has an IPv6 address in brackets among its hosts. Write it without them, "
                "and its port separately: ?host=::1,::2&port=5432,5432."
            )
    target = target_of(url)
    if target is not None and target not in TARGETS:
        raise exc.ArgumentError(
            f"{what} has target_session_attrs={target}: it is one of {listed(TARGETS)}."
        )


def target_of(url: URL) -> str | None:
    """Return ``target_session_attrs``, if a URL has it.

    :param url: The URL.
    """
    target = url.query.get("target_session_attrs")
    return target if target is None or isinstance(target, str) else ",".join(target)


def one_url_per_host(url: URL, which: str) -> list[URL]:
    """Return a URL for each host of the URL of replicas.

    A session keeps to one replica, so that it does not go back in time. One engine for all of them
    could not tell which one a connection has reached.

    :param url: The URL, checked.
    :param which: Which replica it is, for the error.
    :raises sqlalchemy.exc.ArgumentError: if it asks for the primary.
    """
    if url.get_backend_name() != "postgresql" or url.get_driver_name() not in PSYCOPG:
        return [url]
    if target_of(url) in _OF_THE_PRIMARY:
        raise exc.ArgumentError(
            f"The URL of {which} has target_session_attrs={target_of(url)}, with which no standby "
            "is used: write standby, or leave it out."
        )
    hosts = _hosts(url, f"The URL of {which}")
    if len(hosts) < 2:
        return [url]
    ports = str(_connect_args(url).get("port") or "").split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    alone = URL.create(
        url.drivername,
        username=url.username,
        password=url.password,
        database=url.database,
        query=url.difference_update_query(["host", "port"]).query,
    )
    return [
        alone.update_query_dict({"host": host, "port": port} if port else {"host": host})
        for host, port in zip(hosts, ports, strict=True)
    ]


def _hosts(url: URL, what: str) -> list[str]:
    try:
        return str(_connect_args(url).get("host") or "").split(",")
    except (exc.ArgumentError, ValueError) as error:
        # ValueError: SQLAlchemy does not expect an IPv6 address with a port.
        reason = str(error).rstrip(".") if isinstance(error, exc.ArgumentError) else "a wrong host"
        raise exc.ArgumentError(f"{what} has hosts that are wrong ({reason}). {FORMS}") from None


def _connect_args(url: URL) -> dict[str, Any]:
    """Return what SQLAlchemy would pass to the driver."""
    return dict(url.get_dialect()().create_connect_args(url)[1])
