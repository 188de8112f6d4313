"""HTTP: health, status, metrics and control, on one loopback address by default."""
