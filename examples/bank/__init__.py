"""A bank: accounts and transfers, as an HTML page and as JSON.

What to copy: :mod:`.database` (the extension), :mod:`.models`, :mod:`.app` (the views).

What shows how it behaves: :mod:`.demo` runs it as a real server, :mod:`.server`, beside the same
app on stock Flask-SQLAlchemy, :mod:`.stock`, and prints what each sends to PostgreSQL.
"""
