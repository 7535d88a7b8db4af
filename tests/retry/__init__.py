"""``retry_transaction()``: what PostgreSQL asks to run again, and nothing else. Real conflicts."""
