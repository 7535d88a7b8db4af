"""``atomic()``: a transaction where there is none, a savepoint inside one. Checked on the wire."""
