"""The tests, and the two tools that the examples share: a PostgreSQL server and a wire proxy."""
