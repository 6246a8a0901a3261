"""One turn of a replica: a `StepPlan` that the scheduler makes and the engine runs.

The engine returns a `SampleProgress` for every sample of the plan. A `Sample` is one image of a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mii_serve.errors import MiiServeError
from mii_serve.types.batch_shape import BatchShape
from mii_serve.types.params import GenerationParams
from mii_serve.types.request import InputImage, Priority


@dataclass(frozen=True, slots=True, order=True)
class SampleId:
    """One image of one request."""

    request_id: str
    image_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image to make, the unit that holds a slot."""

    id: SampleId
    params: GenerationParams
    input_image: InputImage | None = None
    encoded_image: object | None = field(default=None, repr=False, compare=False)
    """What the engine has made of the image already; None where it is to do so when the sample joins."""

    @property
    def seed(self) -> int:
        return self.params.seed_of(self.id.image_index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the scheduler needs to know of a request.

    `num_calls` are the UNet calls each image takes, as `Engine.check` counts them. `deadline` is a point on the replica's
    monotonic clock, in seconds. `preview_every` is in UNet calls. Requests of one `client` share one part of a busy replica;
    clients of one address, `ADDRESS/NAME` and `ADDRESS`, share the address's part.
    """

    id: str
    params: GenerationParams
    num_calls: int
    client: str = ""
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    preview_every: int | None = None
    input_image: InputImage | None = None
    encoded_image: object | None = field(default=None, repr=False, compare=False)
    """As in `Sample`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one turn does, in this order.

    Forget `leaves`; take in `joins`; make one UNet call for all of `steps`, which agree in `GenerationParams.batch_key`; decode
    `previews`, which are among `steps`, as if they ended now; decode the pictures of `decodes`, which have made all their calls
    (the last one perhaps in this very turn) and are forgotten afterwards.
    """

    joins: tuple[Sample, ...] = ()
    steps: tuple[SampleId, ...] = ()
    previews: tuple[SampleId, ...] = ()
    decodes: tuple[SampleId, ...] = ()
    leaves: tuple[SampleId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One finished image: `rgb` is height × width × 3 bytes, row by row.

    `nsfw_content_detected` is None where the model has no safety checker. The dropped texts are what did not fit into the
    text encoder's tokens, empty where all of it did.
    """

    width: int
    height: int
    rgb: bytes = field(repr=False)
    nsfw_content_detected: bool | None
    dropped_prompt: str = field(default="", repr=False)
    dropped_negative_prompt: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleProgress:
    """What a turn did for one sample: it has made `step` of its `num_steps` UNet calls, and may have a preview or its picture.

    With `error` the sample has failed by itself and is forgotten; the engine and the other samples are not affected.
    """

    id: SampleId
    step: int
    num_steps: int
    preview: Picture | None = None
    picture: Picture | None = None
    error: MiiServeError | None = None

    @property
    def is_over(self) -> bool:
        return self.picture is not None or self.error is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapacity:
    """How many samples the engine can hold at once, and how many pictures it decodes in one go.

    `max_latent_pixels_per_call` is the largest UNet call (rows × latent height × latent width) that fits into the device's
    memory, as far as a failed call has shown, or into memory set aside; None while there is no such bound. A turn that is
    larger takes several calls.
    """

    max_slots: int
    max_decodes: int = 1
    max_latent_pixels_per_call: int | None = None
    buckets: tuple[BatchShape, ...] = ()
    """The captured batch shapes. A batch is padded to the smallest one that holds it, so samples that fill it cost nothing."""
    has_fixed_rows: bool = False
    """Of the buckets, see `BatchShape.holds`."""
