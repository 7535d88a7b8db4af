"""How :mod:`fictive_sqlalchemy.filter_by_or_create` finds, creates and updates one row."""
