"""What SQL does, as far as its text tells."""

from __future__ import annotations

import pytest

from fictive_sqlalchemy._core.sql import evidently_reads, evidently_writes

READS = [
    "SELECT 1",
    "SELECT 1 ; ",
    "",
    "-- nothing",
    "(SELECT 1) UNION (SELECT 2)",
    "VALUES (1)",
    "TABLE author",
    "SHOW lock_timeout",
    "EXPLAIN SELECT 1",
    "SELECT 'insert'",
    "SELECT E'it\\'s an update'",
    "SELECT $$DELETE FROM author$$, $x$ $$ update $x$",
    "SELECT 1 -- for update",
    "/* update */ SELECT 1",
    'SELECT "insert" FROM "update"',
    "SELECT paper.share FROM paper",
    "SELECT a AS share FROM paper",
    "SELECT 1 FROM share",
    "SELECT count(*) FROM t WHERE a = ANY (%(x)s)",
    "SELECT a FROM t WHERE b = :update",
    "SELECT lower(a), own_function(a) FROM t",
    "SELECT x::numeric(10,2) FROM t",
    "SELECT extract(epoch FROM now())",
    "SELECT pg_catalog.lower('x')",
    "SELECT * FROM generate_series(1, 2) AS s (i)",
    "SELECT a FROM t JOIN LATERAL unnest(t.b) x ON true",
    "SELECT a FROM (VALUES (1), (2)) AS v (a)",
    "WITH t AS MATERIALIZED (SELECT 1 AS a) SELECT a FROM t",
    "WITH RECURSIVE t (n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM t) SELECT sum(n) FROM t",
]

CHANGES = [
    "INSERT INTO t VALUES (1)",
    "/* a reason */ update t set a = 1",
    "DELETE FROM t",
    "MERGE INTO t USING u ON true WHEN MATCHED THEN DELETE",
    "TRUNCATE t",
    "CALL procedure(1)",
    "DO $$ BEGIN END $$",
    "COPY t FROM STDIN",
    "SELECT 1; DELETE FROM t",
    "WITH x AS (DELETE FROM t RETURNING a) SELECT * FROM x",
    "WITH x AS NOT MATERIALIZED (INSERT INTO t VALUES (1) RETURNING a) TABLE x",
]

MAY_WRITE = [
    "SELECT a FROM t FOR UPDATE",
    "SELECT a FROM t FOR NO KEY UPDATE OF t",
    "SELECT a FROM t FOR KEY SHARE",
    "SELECT a INTO b FROM c",
    "EXPLAIN (ANALYZE) DELETE FROM t",
    "SELECT own_function(1)",
    'SELECT "ownFunction"(1)',
    'SELECT s."ownFunction" (1)',
    "SELECT * FROM own_function(1)",
    'SELECT * FROM "s"."ownFunction"(1)',
    "SELECT a FROM t, LATERAL own_function(t.a)",
    "SELECT * FROM ROWS FROM (own_function(1))",
    "SELECT extract(year FROM now()), nextval('s')",
    "SELECT pg_catalog.nextval('s') FROM t",
    'SELECT "nextval"(a) FROM t',
    "SELECT pg_advisory_xact_lock(1)",
    "SELECT set_config('a.b', 'c', true)",
    "SET LOCAL lock_timeout TO 1",
    "LISTEN channel",
    "CREATE TABLE t (a int)",
    "BEGIN",
    "LOCK TABLE t",
    "FETCH 1 FROM cursor",
]


@pytest.mark.parametrize("sql", READS)
def test_a_statement_that_evidently_reads_is_recognised(sql: str) -> None:
    assert evidently_reads(sql)
    assert not evidently_writes(sql)


@pytest.mark.parametrize("sql", CHANGES)
def test_a_statement_that_evidently_changes_rows_is_recognised(sql: str) -> None:
    assert evidently_writes(sql)
    assert not evidently_reads(sql)


@pytest.mark.parametrize("sql", MAY_WRITE)
def test_a_statement_that_may_write_or_lock_does_not_evidently_read(sql: str) -> None:
    assert not evidently_reads(sql)
