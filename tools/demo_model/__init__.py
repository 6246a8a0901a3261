"""The recipe of the built-in `demo` model: its small world, its training stages, and the detector that grades it."""
