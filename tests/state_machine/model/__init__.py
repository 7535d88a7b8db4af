"""The contract of a session as a model in plain Python, without a database.

It knows three things:

* :class:`~.parts.Store`: what is committed, what each open transaction has changed, and which
  transaction waits for which;
* :class:`~.parts.Thing`: one object as SQLAlchemy sees it, its loaded values and its unsaved
  changes;
* :class:`~.session.Model`: one session, which is outside, inside, or inside savepoints.

The model of a session is in layers. Each layer calls only itself and the layers below it in this
list:

* ``session.py``: what is done with objects;
* ``transactions.py``: savepoints, what ends a transaction or flushes outside;
* ``flushes.py``: the unit of work, and what a rollback does to it;
* ``writes.py``: the rows that a statement writes;
* ``connection.py``: whether it is outside or inside, what takes it inside, and what is sent.

An operation of the model either returns what the operation of the real session returns, or raises
:class:`~.parts.Fails` with the errors that the real one may raise. If the server process of a
connection is killed, the next operation fails only if the connection is in a transaction that has
sent something.
"""
