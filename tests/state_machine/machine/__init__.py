"""The steps that two sessions can take. Each session has a model, which takes the same steps.

* ``rules.py``: the rules by which Hypothesis chooses the steps;
* ``checks.py``: what holds after each step, and at the end;
* ``objects.py``, ``queries.py``, ``streams.py``, ``writes.py``, ``transactions.py``,
  ``connections.py``, ``others.py``, ``interruptions.py``: the steps, by what they are about;
* ``sessions.py``: the two sessions, and how a session and its model take the same step.
"""
