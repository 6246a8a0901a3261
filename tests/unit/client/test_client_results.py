"""What is made of an answer: pixels, events, one result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from scripted_server import all_events, done, effective, encoded, image, preview, queued

from mii_serve import client, types
from mii_serve.client import GenerationResult, PictureReady, PreviewReady
from mii_serve.client.calls import StreamCall
from mii_serve.client.results import ResultBuilder
from mii_serve.errors import MiiServeError
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.types import Event, GenerationRequest, ImageFormat, OutputOptions, RequestedParams


def asking(num_images: int = 1, image_format: ImageFormat = ImageFormat.PNG) -> GenerationRequest:
    params = RequestedParams(prompt="a", num_images_per_prompt=num_images, seed=5)
    return GenerationRequest(params=params, output=OutputOptions(format=image_format))


def result(events: Iterable[Event]) -> GenerationResult:
    return ResultBuilder().add_all(events)


def test_the_events_are_the_servers_own_classes() -> None:
    for name in ("Queued", "Started", "Step", "Restarted", "Done", "EffectiveParameters", "ServerInfo", "ReplicaInfo"):
        assert getattr(client, name) is getattr(types, name)
    assert issubclass(PictureReady, types.ImageReady)
    assert issubclass(PreviewReady, types.Preview)


@pytest.mark.parametrize("image_format", ImageFormat)
def test_an_image_gets_its_pixels_and_keeps_its_bytes(image_format: ImageFormat) -> None:
    event = image(asking(image_format=image_format), 0)
    picture = ResultBuilder().add(event)
    assert isinstance(picture, PictureReady)
    assert (picture.image.mode, picture.image.size, picture.seed) == ("RGB", (16, 8), 5)
    assert picture.encoded is event.encoded


def test_a_preview_gets_its_pixels_and_is_no_part_of_the_result() -> None:
    builder = ResultBuilder()
    shown = builder.add(preview(asking()))
    assert isinstance(shown, PreviewReady)
    assert shown.image.size == (16, 8)
    assert len(builder.add_all(all_events(asking())).images) == 1


def test_every_other_event_passes_as_it_is() -> None:
    events = [event for event in all_events(asking()) if not isinstance(event, types.ImageReady)]
    builder = ResultBuilder()
    assert all(builder.add(event) is event for event in events)


def test_images_come_out_in_index_order() -> None:
    request = asking(2)
    one = result([image(request, 1), image(request, 0), done(effective(request))])
    assert [picture.getpixel((0, 0)) for picture in one.images] == [(200, 0, 10), (200, 40, 10)]
    assert one.seeds == [5, 6]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"encoded": b"not a picture"}, "cannot be read as PNG"),
        ({"encoded": encoded(ImageFormat.PNG)[:48]}, "cannot be read as PNG"),
        ({"encoded": encoded(ImageFormat.JPEG)}, "cannot be read as PNG"),
        ({"width": 17}, "announced as 17x8"),
        ({"format": ImageFormat.RAW_RGB}, "cannot be read as RAW_RGB"),
        ({"image_index": 1}, r"images \[1\] of 1"),
    ],
)
def test_a_damaged_answer_is_an_error_and_not_a_wrong_picture(changed: dict[str, Any], reason: str) -> None:
    request = asking()
    with pytest.raises(MiiServeError, match=reason):
        result([replace(image(request, 0), **changed), done(effective(request))])


def test_a_stream_without_its_end_has_no_result() -> None:
    with pytest.raises(MiiServeError, match="ended before"):
        result(list(all_events(asking()))[:-1])


def test_a_stream_that_lost_an_image_has_no_result() -> None:
    request = asking(2)
    with pytest.raises(MiiServeError, match=r"images \[1\] of 2"):
        result([queued(), image(request, 1), done(effective(request))])


def test_flags_that_are_not_all_known_are_none() -> None:
    request = asking(2)
    mixed = [image(request, 0, flag=True), image(request, 1, flag=None), done(effective(request))]
    assert result(mixed).nsfw_content_detected is None
    blocked = [replace(image(request, index), moderation_blocked=index == 1) for index in range(2)]
    assert result([*blocked, done(effective(request))]).moderation_blocked == [False, True]


def test_prompts_stay_out_of_repr() -> None:
    request = GenerationRequest(params=RequestedParams(prompt="a secret", negative_prompt="a worry"))
    parameters = replace(effective(request), dropped_prompt="a tail")
    shown = repr(result([image(request, 0), done(parameters)]))
    assert not any(text in shown for text in ("secret", "worry", "tail"))


# ---- messages of a newer server ------------------------------------------------------------------------------------


def test_an_event_of_a_newer_server_is_passed_over() -> None:
    call = StreamCall(None, "nowhere")
    assert call._event(pb.GenerateEvent(request_id="r")) is None
    assert call.request_id == "r"


def test_an_image_of_an_unknown_format_is_an_error() -> None:
    message = pb.GenerateEvent(request_id="r", image=pb.GeneratedImage(data=b"x", format=77))  # type: ignore[arg-type]
    with pytest.raises(MiiServeError, match="number 77"):
        StreamCall(None, "nowhere")._event(message)
