"""``retry_transaction()`` runs again what PostgreSQL asks to, and nothing else.

The conflicts are real ones, between two transactions.
"""
