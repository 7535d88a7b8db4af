"""Compares what the database has with what the clients were told. Each sentence is a failure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tests.cluster.records import BALANCE, TENANT, Answer, Moment, Rest, Stored

#: How long after a server takes writes the first transfer may come, in seconds.
PATIENCE = 2.0

#: How long after a promotion a read may still go to the server as to a replica, in seconds.
GRACE = 3.0

# Enough of each kind to see what it is.
_MOST = 3


def judge_stored(
    stored: Stored, answers: Sequence[Answer], *, settings: bool
) -> tuple[list[str], list[str]]:
    """Compare the database with all answers of the run.

    :param stored: What the database has.
    :param answers: All answers.
    :param settings: Whether each transfer was to have a tenant.
    :returns: The failures, and the ids of transfers that are lost: answered with success, and not
        there.
    """
    rows = Counter(row.id for row in stored.ledger)
    wrong: list[str] = []
    lost: list[str] = []
    for answer in answers:
        if not answer.writes:
            continue
        said = f"transfer {answer.id} was answered with {answer.outcome!r} ({answer.error})"
        there = rows[answer.id]
        if answer.outcome == "stored" and not there:
            lost.append(answer.id)
        elif answer.outcome == "not stored" and there:
            wrong.append(f"{said}, and it is stored: {answer.text}")
        elif there > 1:
            wrong.append(f"{said}, and it is stored {there} times")
    wanted = {
        answer.id: (answer.source, answer.target, answer.amount)
        for answer in answers
        if answer.writes
    }
    for row in stored.ledger:
        if row.id not in wanted:
            wrong.append(f"transfer {row.id} is stored, and nobody has asked for it")
        elif wanted[row.id] != (row.source, row.target, row.amount):
            wrong.append(f"transfer {row.id} is stored as {row}, and not as it was asked for")
        if settings and row.tenant != TENANT:
            wrong.append(f"transfer {row.id} was stored for tenant {row.tenant!r}")
    return [*_few(wrong), *_judge_money(stored)], lost


def _judge_money(stored: Stored) -> Iterator[str]:
    expected = dict.fromkeys(stored.balances, BALANCE)
    for row in stored.ledger:
        expected[row.source] -= row.amount
        expected[row.target] += row.amount
    total, wanted = sum(stored.balances.values()), len(stored.balances) * BALANCE
    if total != wanted:
        yield f"there is {total} in all instead of {wanted}"
    for account, balance in stored.balances.items():
        if balance != expected[account]:
            yield f"account {account} has {balance}, and by the ledger {expected[account]}"


def judge_moment(
    moment: Moment, ports: dict[int, str], *, synchronous: bool = True, direct: bool = True
) -> list[str]:
    """Judge the answers of one moment.

    :param moment: The moment.
    :param ports: The node of each port that a replica's connection may go to.
    :param synchronous: Whether a COMMIT waits for a standby. Else PostgreSQL itself may go back.
    :param direct: Whether the bank is connected to the servers themselves. PgBouncer does not tell
        it whether a server is a standby, so no error can say it.
    :returns: The failures.
    """
    answers = moment.answers
    failures: list[str] = []
    checks = [_no_answer]
    checks += [_own_write, _back_in_time] * synchronous + [_bare_read_only] * direct
    for check in checks:
        # With the time, by which the server's log says what it did just then.
        found = [
            f"{answer.ended - moment.at:+.2f} s: {said}"
            for answer in answers
            for said in check(answer)
        ]
        failures += _few(found)
    failures += _few(list(_asked_as_replica(moment, ports)))
    failures += _first_transfer(moment)
    return failures


def _no_answer(answer: Answer) -> Iterator[str]:
    if answer.status not in (200, 201, 503):
        yield f"a {answer.kind} got no answer of the app: {answer.error} {answer.text}"


def _back_in_time(answer: Answer) -> Iterator[str]:
    values = [seen.value for seen in answer.reads]
    if values != sorted(values):
        yield f"a session went back in time: {_places(answer)}"


def _own_write(answer: Answer) -> Iterator[str]:
    after = answer.reads[answer.before :]
    if answer.outcome == "stored" and any(one.value < answer.serial for one in after):
        yield f"a session did not see its own write {answer.serial}: {_places(answer)}"


def _bare_read_only(answer: Answer) -> Iterator[str]:
    if "read-only transaction" in answer.text and "is a standby" not in answer.text:
        yield f"the error of a {answer.kind} does not say why it is read-only: {answer.text}"


def _asked_as_replica(moment: Moment, ports: dict[int, str]) -> Iterator[str]:
    """A read may go to a promoted server, but as to the primary, not as to a replica."""
    since: dict[str, float] = {}
    for change in moment.changes:
        since.pop(change.node, None)
        if change.state == "primary":
            since[change.node] = change.at
    for answer in moment.answers:
        for seen in answer.reads:
            node = ports.get(seen.port)
            if seen.engine == "primary" or node is None or node not in since:
                continue
            if seen.at > since[node] + GRACE and answer.started > since[node]:
                after = seen.at - since[node]
                yield (
                    f"{node} was read from as {seen.engine}, {after:.1f} s after it became the "
                    f"primary: {_places(answer)}"
                )


def _first_transfer(moment: Moment) -> Iterator[str]:
    took = moment.took_writes
    if took is None:
        if moment.after != moment.before:
            yield f"{moment.after} is the primary, and was not seen to take writes"
        return
    first = moment.first_stored
    if first is None:
        yield "no transfer was stored after a new primary took writes"
    elif first - took > PATIENCE:
        yield f"the first transfer came {first - took:.2f} s after a new primary took writes"


def judge_rest(rest: Rest, workers: int) -> list[str]:
    """Judge what is left when no request is under way.

    :param rest: What is left.
    :param workers: How many processes of the app there are.
    :returns: The failures.
    """
    failures: list[str] = []
    if len(rest.workers) != workers:
        failures.append(f"{len(rest.workers)} of {workers} processes have told of their pools")
    for worker in rest.workers:
        for name, pool in worker["engines"].items():
            said = f"process {worker['process']}, {name}"
            if pool["in_use"]:
                failures.append(f"{said}: {pool['in_use']} connections are in use")
            failures += [f"{said}: a connection is {wrong}" for wrong in pool["wrong"]]
    failures += [f"a server process is in a transaction: {one}" for one in rest.in_transaction]
    return failures


def _places(answer: Answer) -> str:
    return ", ".join(
        f"{seen.value} from {seen.engine} (port {seen.port}{', standby' * seen.standby})"
        for seen in answer.reads
    )


def _few(sentences: list[str]) -> list[str]:
    more = len(sentences) - _MOST
    return [*sentences[:_MOST], *([f"… and {more} more like the last"] if more > 0 else [])]
