"""Keep diffusers and transformers quiet while they load: no progress bars, no notes about deprecations or missing extras.

Errors still come through, and what the operator must know about a model is in our own log.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = r"(diffusers|transformers|huggingface_hub|accelerate|torch)(\.|$)"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries within the block, and leave them as they were. Not for use by several threads at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", module=_LIBRARIES)
        from transformers.utils import logging as transformers_logging

        # diffusers only takes part in this once transformers is quiet: importing it makes transformers speak.
        with _hushed(transformers_logging):
            from diffusers.utils import logging as diffusers_logging

            with _hushed(diffusers_logging):
                yield


@contextmanager
def _hushed(logging: object) -> Iterator[None]:
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()  # type: ignore[attr-defined]
    logging.set_verbosity_error()  # type: ignore[attr-defined]
    logging.disable_progress_bar()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)  # type: ignore[attr-defined]
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[attr-defined]
