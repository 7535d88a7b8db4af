"""Benchmarks beside stock Flask-SQLAlchemy: ``python -m nox -s bench -- core`` runs the first."""
