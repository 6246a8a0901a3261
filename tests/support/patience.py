"""How long a test waits for what must come. Only what is broken takes so long: no outcome hangs on a machine's speed."""

PATIENCE_S = 240.0
"""For one step of another process, thread or task. Far beyond what a loaded machine needs, within the bound of a whole test."""
