"""The page for people at `/`, and the few calls it makes under `/ui`."""
