"""Tests that pass with stock and fail with ours, and why: the one place where they are listed.

A test that is listed and passes, does not exist or fails with stock, too, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

#: For each application: for each mode: the name of the test, and the reason.
EXCEPTIONS: Mapping[str, Mapping[str, Mapping[str, str]]] = {}
