"""What two sessions can do, step by step, beside the model of each.

* ``rules.py``: the rules by which Hypothesis chooses the steps;
* ``checks.py``: what holds after each step, and at the end;
* ``objects.py``, ``queries.py``, ``streams.py``, ``writes.py``, ``transactions.py``,
  ``connections.py``, ``others.py``, ``interruptions.py``: the steps, by what they are about;
* ``sessions.py``: the two sessions, and how one of them and its model do the same.
"""
