"""The cluster: what a bank's users see while PostgreSQL fails over, measured and judged.

``python -m nox -s cluster`` runs it. On the loopback interface there are

* three PostgreSQL servers under Patroni, with an etcd, and a HAProxy that knows which is primary;
* PgBouncer in transaction mode before that;
* for one of the moments, a proxy that cuts connections in the middle of COMMIT;
* the bank, :mod:`tests.cluster.app`, in a gunicorn of two processes with eight threads each;
* clients, :mod:`tests.cluster.load`, which move money and read, all the time.

One after another the *moments* of :mod:`tests.cluster.moments` come: the primary is killed, the
roles are switched, and so on. After each one :mod:`tests.cluster.judge` compares the database with
what the clients were told, and :mod:`tests.cluster.report` shows how long they had to wait.
"""
