"""The feed: one table of all changes, in commit order, that applications read by cursor."""
