"""PostgreSQL as a source, and what its mirror shares with it."""
