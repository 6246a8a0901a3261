"""The HTTP face. Needs the extra `http`."""
