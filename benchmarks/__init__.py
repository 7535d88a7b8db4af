"""Benchmarks of this package beside its peers: ``python -m nox -s bench`` runs all of them."""
