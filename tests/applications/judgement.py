"""What the three runs of an application say: the tests that differ, and what must not be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .suites import MODES, Outcome

Exceptions = Mapping[str, Mapping[str, str]]
"""The tests that may fail: for each mode their names, each with its reason."""


@dataclass(frozen=True)
class Verdict:
    """What an application's runs say, one line each."""

    differences: tuple[str, ...]
    """The tests that pass in one run and not in another, exceptions included."""
    errors: tuple[str, ...]
    """What must not be. Empty if all is well."""


def judge(
    outcomes: Mapping[str, Outcome], exceptions: Exceptions, strict_may_differ: bool = False
) -> Verdict:
    """Compare the runs of our class with the one of stock.

    :param outcomes: What became of the tests, for each of :data:`.suites.MODES`.
    :param exceptions: The tests that may fail; one that is listed in vain is an error.
    :param strict_may_differ: Whether any test may fail in the strict mode: for an application
        that nobody has looked at yet.
    """
    stock = outcomes["stock"]
    differences: list[str] = []
    errors: list[str] = []
    if not stock.passed:
        errors.append("nothing passes with stock: is it set up?")
    for mode in MODES[1:]:
        ours = outcomes[mode]
        listed = exceptions.get(mode, {})
        failed = stock.passed - ours.passed
        for test in sorted(failed):
            if test in listed:
                differences.append(f"{mode}: {test} fails, as listed: {listed[test]}")
            else:
                said = ours.failed.get(test, "It was not run, or was skipped.")
                differences.append(f"{mode}: {test} fails\n{said}")
                if mode != "strict" or not strict_may_differ:
                    errors.append(f"{mode}: {test} passes with stock and fails with ours")
        differences += [
            f"{mode}: {test} passes, and does not with stock"
            for test in sorted(ours.passed - stock.passed)
        ]
        errors += [
            f"{mode}: {test} is listed in vain: {_why_in_vain(test, stock, ours)}"
            for test in sorted(listed.keys() - failed)
        ]
        if not ours.in_autocommit:
            errors.append(
                f"{mode}: no engine of our class was on PostgreSQL: is our class still put in?"
            )
    return Verdict(tuple(differences), tuple(errors))


def _why_in_vain(test: str, stock: Outcome, ours: Outcome) -> str:
    if test in ours.passed:
        return "it passes"
    if test in stock.failed:
        return "it fails with stock, too"
    return "it was not run"
