"""Keeps pictures that should not be seen from being seen."""
