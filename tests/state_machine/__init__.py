"""The state machine: random steps of two sessions, and a model that predicts the outcome of each.

* ``tables.py``: the mapped classes;
* ``model``: the contract of a session in plain Python;
* ``machine``: the steps, the checks after each, and the rules by which Hypothesis chooses.

``tests/core/test_state_machine.py`` runs it.
"""

import pytest

# So that a check that fails says what it has compared.
pytest.register_assert_rewrite("tests.state_machine.machine")
