"""Where one request's time went on a replica: for each image a span for its wait and for every stage."""

from __future__ import annotations

from collections.abc import Mapping

from mii_serve.tracing import add_span


class RequestTrace:
    """A turn serves many requests at once: each of them records the whole time of a stage."""

    def __init__(self, traceparent: str | None, accepted_at: float) -> None:
        """`traceparent`: the parent of the spans; None where nothing is traced. All times are of `time.monotonic()`."""
        self._traceparent = traceparent
        self._accepted_at = accepted_at
        self._denoising_since: dict[int, float] = {}

    def joined(self, image_index: int, now: float) -> None:
        self._add("queue", image_index, self._accepted_at, now)

    def advanced(self, image_index: int, start: float, stages: Mapping[str, float], *, is_over: bool) -> None:
        """It took part in a turn that began at `start`, and whose stages took so many seconds, one after the other."""
        if self._traceparent is None:
            return
        encoded = start + stages.get("encode", 0.0)
        if image_index not in self._denoising_since:
            self._add("encode", image_index, start, encoded)
            self._denoising_since[image_index] = encoded
        if is_over:
            denoised = encoded + stages.get("denoise", 0.0)
            decoded = denoised + stages.get("decode", 0.0)
            self._add("denoise", image_index, self._denoising_since[image_index], denoised)
            self._add("decode", image_index, denoised, decoded)
            self._add("safety", image_index, decoded, decoded + stages.get("safety", 0.0))

    def encoded(self, image_index: int, start: float, end: float) -> None:
        self._add("encode_image", image_index, start, end)

    def _add(self, name: str, image_index: int, start: float, end: float) -> None:
        add_span(name, self._traceparent, start, end, {"mii_serve.image_index": image_index})
