"""Change data capture: sources, a durable queue, and delivery to sinks."""

__version__ = "0.1.0"
