"""Tables, sessions and migrations. Postgres is the one engine, and the one truth."""
