"""The state machine of ``tests/core`` with random seeds, in a process of its own.

Hypothesis shrinks what fails, so one process is enough to say what is wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

_ROOT = Path(__file__).parents[2]
_TEST = "tests/core/test_state_machine.py"


class StateMachine:
    """Run the state machine with one seed after the other, while something else goes on.

    :param driver: ``"psycopg2"`` or ``"psycopg"``.
    :param seed: What the seeds come from.
    :param examples: How many sequences of steps are tried with each seed.
    """

    def __init__(self, driver: str, seed: int, examples: int = 50) -> None:
        self.seeds_done = 0
        """With how many seeds it has passed."""
        self.failures: list[str] = []
        """For each failure how to repeat it, and what was said."""
        self._driver = driver
        self._examples = examples
        self._random = Random(seed)
        self._seed = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (stop() closes it)

    def go_on(self) -> None:
        """Start the next seed if the one before is done. Does not wait."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            self._take(code)
        self._seed = self._random.randrange(1, 2**31)
        self._output.seek(0)
        self._output.truncate()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", _TEST],
            cwd=_ROOT,
            env={**os.environ, **self._settings()},
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def run(self, seconds: float) -> None:
        """Run seeds for some time, in which nothing else goes on."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.go_on()
            time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))

    def stop(self) -> None:
        """End the seed that is being tried; what it has found until then is lost."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                self._process.terminate()
                self._process.wait(30)
            else:
                self._take(code)
        self._process = None
        self._output.close()

    def _settings(self) -> dict[str, str]:
        return {
            "TEST_DRIVER": self._driver,
            "MODEL_SEED": str(self._seed),
            "MODEL_EXAMPLES": str(self._examples),
        }

    def _take(self, code: int) -> None:
        if code == 0:
            self.seeds_done += 1
            return
        self._output.seek(0)
        said = self._output.read().decode(errors="replace")
        settings = " ".join(f"{name}={value}" for name, value in self._settings().items())
        self.failures.append(f"{settings} python -m pytest {_TEST}\n{said[-6000:]}")
