"""The moments: what is done to the cluster while the clients go on, and what they see of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psycopg2

from tests.cluster.judge import judge_moment, judge_rest, judge_stored
from tests.cluster.keeping import ClusterError, wait_for
from tests.cluster.records import Moment
from tests.cluster.stage import WORKERS, Stage

#: How long the clients go on before anything is done, in seconds.
LEAD = 2.0

_CUTS = 20


def kill_primary(stage: Stage) -> str:
    """Kill the primary's first process, so that the others end, too."""
    primary = stage.cluster.primary()
    stage.cluster.kill_postgres(primary)
    return f"the PostgreSQL of {primary.name} was killed"


def kill_primary_ahead(stage: Stage) -> str:
    """Kill the primary when it has stored for a while what no standby has."""
    primary = stage.cluster.primary()
    stage.cluster.kill_postgres_ahead(primary, 0.5)
    return f"the PostgreSQL of {primary.name} was killed, whose standbys were half a second behind"


def switch_over(stage: Stage) -> str:
    """Let Patroni make the synchronous standby the primary."""
    old, new = stage.cluster.primary(), stage.cluster.synchronous_standby()
    stage.cluster.switch(old, new)
    return f"from {old.name} to {new.name}, as asked for"


def lose_replica(stage: Stage) -> str:
    """Kill the synchronous standby and its Patroni; start them again some seconds later."""
    standby = stage.cluster.synchronous_standby()
    stage.cluster.kill_node(standby)
    time.sleep(min(4.0, stage.wanted.seconds / 3))
    stage.cluster.start_patroni(standby)
    return f"{standby.name} was killed, and started some seconds later"


def pause_replication(stage: Stage) -> str:
    """Let a standby show nothing newer for some seconds."""
    cluster = stage.cluster
    standby = next(node for node in cluster.nodes if cluster.role(node) == "replica")
    standby.query("SELECT pg_wal_replay_pause()")
    time.sleep(min(5.0, stage.wanted.seconds / 2))
    standby.query("SELECT pg_wal_replay_resume()")
    return f"{standby.name} showed nothing newer for some seconds"


def cut_commits(stage: Stage) -> str:
    """Cut connections after COMMIT was sent and before its answer has come."""
    before = stage.scissors.cuts
    stage.scissors.cut(_CUTS)
    wait_for(lambda: stage.scissors.cuts == before + _CUTS, f"{_CUTS} COMMITs", patience=30)
    return f"{_CUTS} connections were cut in the middle of COMMIT"


def restart_pgbouncer(stage: Stage) -> str:
    """Kill PgBouncer, and start it again a second later."""
    stage.cluster.kill_pgbouncer()
    time.sleep(1.0)
    stage.cluster.start_pgbouncer()
    return "killed, and started a second later"


MOMENTS: dict[str, Callable[[Stage], str]] = {
    "primary killed": kill_primary,
    "primary killed ahead of its standbys": kill_primary_ahead,
    "switchover": switch_over,
    "replica lost and back": lose_replica,
    "replication paused": pause_replication,
    "cut in the middle of COMMIT": cut_commits,
    "PgBouncer restarted": restart_pgbouncer,
}


def moments_for(through: str, *, synchronous: bool) -> list[str]:
    """Return the names of the moments that mean something.

    :param through: How the bank reaches the primary: ``"hosts"`` or ``"pgbouncer"``.
    :param synchronous: Whether a COMMIT waits for a standby, so that no standby can be behind.
    """
    left_out = [restart_pgbouncer] * (through == "hosts") + [kill_primary_ahead] * synchronous
    return [name for name, moment in MOMENTS.items() if moment not in left_out]


def play(stage: Stage, name: str) -> Moment:
    """Play one moment, and judge it.

    :param stage: The stage, on which the clients wait.
    :param name: Of the moment.
    """
    cluster, load = stage.cluster, stage.load
    cluster.wait_until_healthy()
    stage.serve(proxied=MOMENTS[name] is cut_commits)
    moment = Moment(name, before=cluster.primary().name)
    cuts = stage.scissors.cuts
    moment.began = time.monotonic()
    reported = _end_of(stage)
    load.go_on()
    time.sleep(LEAD)
    moment.at = time.monotonic()
    moment.model = stage.model(moment.began, moment.at)
    moment.done = MOMENTS[name](stage)
    time.sleep(max(0.0, moment.at + stage.wanted.seconds - time.monotonic()))
    load.pause()
    moment.ended = time.monotonic()
    try:
        cluster.wait_until_healthy()
    except ClusterError as error:
        moment.failures.append(str(error))
    moment.after = cluster.primary().name
    moment.cuts = stage.scissors.cuts - cuts
    moment.answers = stage.answers_since(moment.began)
    moment.changes = [one for one in stage.watch.changes() if one.at <= moment.ended]
    moment.reported = _reported(stage, reported)
    _judge(stage, moment)
    return moment


def _judge(stage: Stage, moment: Moment) -> None:
    ports = {node.port: node.name for node in stage.cluster.nodes}
    wanted = stage.wanted
    try:
        failures, lost = judge_stored(
            stage.stored(), stage.load.answers(), settings=wanted.settings
        )
        rest = stage.rest()
    except (psycopg2.Error, ClusterError) as error:
        moment.failures.append(f"the judge could not look: {error}")
        return
    asked = {answer.id for answer in moment.answers}
    moment.lost = sum(one in asked for one in lost)
    moment.failures += failures
    if lost and not wanted.asynchronous:
        moment.failures.append(f"{len(lost)} transfers are lost, such as {lost[0]}")
    moment.failures += judge_moment(
        moment,
        ports,
        synchronous=not wanted.asynchronous,
        direct=wanted.through == "hosts",
    )
    moment.failures += judge_rest(rest, WORKERS)


def _end_of(stage: Stage) -> int:
    file = stage.cluster.keeper.directory / "requests.log"
    return file.stat().st_size if file.exists() else 0


def _reported(stage: Stage, start: int) -> list[str]:
    """The lines of requests that have failed or waited, the first few."""
    file: Path = stage.cluster.keeper.directory / "requests.log"
    if not file.exists():
        return []
    with file.open("rb") as log:
        log.seek(start)
        lines = log.read().decode(errors="replace").splitlines()
    return [line for line in lines if " 503" in line or "unknown" in line][:8]
