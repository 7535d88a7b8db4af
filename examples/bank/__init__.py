"""A bank: accounts and transfers, as an HTML page and as JSON.

These modules are worth copying: :mod:`.database` (the extension), :mod:`.models`, and :mod:`.app`
(the views).

:mod:`.demo` shows how the bank behaves. It runs the bank as a real server (:mod:`.server`) beside
the same app on stock Flask-SQLAlchemy (:mod:`.stock`), and prints what each sends to PostgreSQL.
"""
