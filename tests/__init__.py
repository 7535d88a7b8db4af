"""The tests, and the two tools they share with the examples: a PostgreSQL server and a wire proxy."""
