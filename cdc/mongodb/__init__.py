"""MongoDB: as a source, and what its sinks need of it."""
