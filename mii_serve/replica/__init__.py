"""One process that owns a device: the loop around scheduler and engine, and the private service in front of it."""
