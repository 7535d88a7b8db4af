"""The soak: what random work and random faults do to the package, for as long as one has time.

``python -m nox -s soak -- --minutes 30`` runs these for each driver in turn:

* the *bank*: threads and processes move money through a proxy that cuts connections at random
  messages, see :mod:`tests.soak.bank`;
* the *tenants*: threads that share three connections, with row-level security, see
  :mod:`tests.soak.tenants`;
* the *state machine* of ``tests/core/test_state_machine.py`` with random seeds, see
  :mod:`tests.soak.machine`.

Whatever fails prints the command, with its seed, that repeats it.
"""
