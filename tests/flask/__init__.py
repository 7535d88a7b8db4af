"""The Flask-SQLAlchemy extension, used as an application uses it."""
