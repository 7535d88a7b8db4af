"""The contract of a session as a model in plain Python, which sends nothing to anybody.

It knows three things:

* :class:`~.parts.Store`: what is committed, what each open transaction has changed, and who waits
  for whom;
* :class:`~.parts.Thing`: one object as SQLAlchemy sees it, its loaded values and its unsaved
  changes;
* :class:`~.session.Model`: one session, which is outside, inside, or inside savepoints.

The model of a session is in layers, of which each calls itself and those below it:

* ``session.py``: what is done with objects;
* ``transactions.py``: savepoints, what ends a transaction or flushes outside;
* ``flushes.py``: the unit of work, and what a rollback does to it;
* ``writes.py``: the rows that a statement writes;
* ``connection.py``: whether it is outside or inside, what takes it inside, and what is sent.

An operation of the model either returns what the real one returns, or raises
:class:`~.parts.Fails` with the errors that the real one may raise. A killed server process is an
error where its connection has sent something of a transaction, and nowhere else.
"""
