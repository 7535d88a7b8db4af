"""Check and split URLs with several hosts. libpq uses the first host that fits the URL.

See https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-MULTIPLE-HOSTS and
https://docs.sqlalchemy.org/en/21/dialects/postgresql.html#specifying-multiple-fallback-hosts
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import URL

from .autocommit import PSYCOPG
from .describe import listed
from .errors import see

#: Which server a connection may go to.
#: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-TARGET-SESSION-ATTRS
TARGETS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")

# The targets with which libpq uses no standby.
_OF_THE_PRIMARY = ("read-write", "primary")

#: How to name several hosts, for errors.
FORMS = (
    "Name several hosts as in ?host=one:5432&host=two:5432, or as in ?host=one,two&port=5432,5432."
    + see("hosts")
)

_IPV6 = "Write it without brackets, and the ports separately: ?host=::1,::2&port=5432,5432." + see(
    "hosts"
)


def check_hosts(url: URL, what: str = "The URL") -> None:
    """Refuse a URL whose hosts or ``target_session_attrs`` libpq would not understand.

    No error shows a value of the URL. If two URLs have run together, the value may be a password.

    :param url: The URL.
    :param what: The name of the URL, for the error.
    :raises sqlalchemy.exc.ArgumentError: if the URL is wrong.
    """
    if not _is_for_libpq(url):
        return
    values = chain.from_iterable(url.normalized_query.values())
    if any("://" in value for value in (url.database or "", url.host or "", *values)):
        raise exc.ArgumentError(
            f"{what} has another URL in it. Pass one URL, and the URLs of replicas as "
            "replicas=[…]: items of a list, or a string with white space between the URLs."
            + see("hosts")
        )
    given = url.normalized_query.get("host", ())
    if len(given) > 1 and any("," in host for host in given):
        raise exc.ArgumentError(f"{what} mixes two ways to name several hosts. {FORMS}")
    hosts = _hosts(url, what)
    for host in hosts:
        # A path or an abstract name stands for a Unix socket. An IPv6 address has several colons,
        # and is not a host with a port.
        if host.startswith(("/", "@")):
            continue
        if "[" in host:
            raise exc.ArgumentError(f"{what} has an IPv6 address in brackets. {_IPV6}")
        if host.count(":") == 1:
            raise exc.ArgumentError(f"{what} has a host with a port in a list. {FORMS}")
        if re.search(r"[\s@]", host):
            raise exc.ArgumentError(f"{what} has a host with a space or an @ in it. {FORMS}")
        if not host and len(hosts) > 1:
            raise exc.ArgumentError(f"{what} has an empty host among several. {FORMS}")
    target = target_of(url)
    if target is not None and target not in TARGETS:
        raise exc.ArgumentError(
            f"{what} has a target_session_attrs that libpq does not know: it is one of "
            f"{listed(TARGETS)}." + see("target-session-attrs")
        )


def target_of(url: URL) -> str | None:
    """Return ``target_session_attrs``, if a URL has it.

    :param url: The URL.
    """
    target = url.normalized_query.get("target_session_attrs")
    return None if target is None else ",".join(target)


def one_url_per_host(url: URL, which: str) -> list[URL]:
    """Return a URL for each host of the URL of replicas.

    A session keeps to one replica, so that its reads do not go back in time. If one engine served
    all hosts, nobody could tell which host a connection has reached.

    :param url: The URL, which :func:`check_hosts` has checked.
    :param which: The name of the replica, for the error.
    :raises sqlalchemy.exc.ArgumentError: if the URL asks for the primary, or can't be split.
    """
    if not _is_for_libpq(url):
        return [url]
    if target_of(url) in _OF_THE_PRIMARY:
        raise exc.ArgumentError(
            f"The URL of {which} has target_session_attrs={target_of(url)}, with which no standby "
            "is used: write target_session_attrs=standby, or leave it out."
            + see("target-session-attrs")
        )
    hosts = _hosts(url, f"The URL of {which}")
    if "," in str(url.query.get("hostaddr", "")) or (len(hosts) > 1 and "hostaddr" in url.query):
        raise exc.ArgumentError(
            f"The URL of {which} has hostaddr for several hosts, each of which is a replica of its "
            "own: give each host its own URL." + see("replica-urls")
        )
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


def _is_for_libpq(url: URL) -> bool:
    return url.get_backend_name() == "postgresql" and url.get_driver_name() in PSYCOPG


def _hosts(url: URL, what: str) -> list[str]:
    reason = _IPV6 if "[" in str(url.query.get("host", "")) else FORMS
    try:
        return str(_connect_args(url).get("host") or "").split(",")
    except (exc.ArgumentError, ValueError):
        pass  # the error below has no cause, because SQLAlchemy's error shows values
    raise exc.ArgumentError(f"{what} has hosts and ports that do not belong together. {reason}")


def _connect_args(url: URL) -> dict[str, Any]:
    """Return what SQLAlchemy would pass to the driver."""
    return dict(url.get_dialect()().create_connect_args(url)[1])
