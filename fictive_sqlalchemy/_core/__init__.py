"""What needs SQLAlchemy alone. Import from ``fictive_sqlalchemy``; nothing in here is public."""
