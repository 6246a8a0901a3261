"""Measures the pictures of an evaluation, scale by scale.

What a picture looks like is measured of the same prompts at all scales: those that have pictures at every scale, none of them
blacked out. Otherwise scales would differ in the number and kind of prompts, and a Fréchet distance depends on the number.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mii_serve.errors import InvalidRequestError
from mii_serve.evaluate.estimates import Estimate, Ints, figure_of, mean_of
from mii_serve.evaluate.features import Item, features_of, folder_items
from mii_serve.evaluate.frechet import Normal, Reference
from mii_serve.evaluate.grader import Grade, graded
from mii_serve.evaluate.networks import ClipScores, Features, Inception, Network, SafetyCheckerSpace
from mii_serve.evaluate.pictures import Picture, failed_rows, lines_of, picture_of

MIN_FID_PICTURES = 2048
"""Fewer pictures than dimensions: FID is then mostly its own bias."""
FLAGGED, FD, FID, CLIP = "flagged", "fd_safety_clip", "fid", "clip_score"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to measure, and with what."""

    scales: Sequence[float]
    checker: str
    """The model whose safety checker compares pictures with the reference."""
    reference: Path | None = None
    inception: Path | None = None
    clip: Path | None = None
    grader: str | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """`text` says what it is and what it was computed with; `is_better` is `higher`, `lower`, or empty where neither is."""

    name: str
    text: str
    is_better: str
    floor: float | None = None
    """Of a distance: that between two halves of the reference, which no model can be expected to beat at their size."""
    floor_pictures: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One scale. `num_repeated` pictures are the same file as another one of this scale."""

    scale: float
    num_pictures: int
    num_failed: int
    num_flagged: int
    num_repeated: int
    num_measured: int
    estimates: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    num_prompts: int
    num_prompts_measured: int
    num_reference: int | None
    metrics: Sequence[Metric]
    rows: Sequence[Row]


def check_asked(asked: Asked) -> None:
    """See to it that what is asked for can be measured, before there are pictures.

    Raises:
        InvalidRequestError, ModelError
    """
    if asked.inception is not None and asked.reference is None:
        raise InvalidRequestError("--inception", "needs --reference: FID is a distance from true pictures")
    for option, path, is_there in (
        ("--reference", asked.reference, Path.is_dir),
        ("--inception", asked.inception, Path.is_file),
        ("--clip", asked.clip, Path.is_dir),
    ):
        if path is not None and not is_there(path):
            raise InvalidRequestError(option, f"is not there: {path}")
    if asked.clip is not None:
        ClipScores(asked.clip, "cpu")
    if asked.reference is not None:
        count = len(folder_items(asked.reference, "--reference"))
        SafetyCheckerSpace(asked.checker, "cpu")
        if asked.inception is not None:
            Inception(asked.inception, "cpu")
            _check_enough("--inception", "the reference has", count, MIN_FID_PICTURES)


def measure(
    job: Path, folder: Path, asked: Asked, grade: Grade | None, on_progress: Callable[[str], None] = lambda _: None
) -> Measured:
    """Measure the pictures of a job that has ended; `folder` keeps what networks have seen in them.

    Raises:
        InvalidRequestError: a network or a folder cannot be used, or the pictures are too few for what was asked.
    """
    count = len(asked.scales)
    pictures = [picture_of(line, job, count) for line in lines_of(job)]
    prompts = {picture.prompt_number for picture in pictures}
    complete = _complete(pictures, count)
    by_scale = [[one for one in pictures if one.scale_number == number] for number in range(count)]
    kept = [[one for one in of_scale if one.prompt_number in complete] for of_scale in by_scale]
    estimates: list[dict[str, Estimate]] = [
        {FLAGGED: mean_of([one.is_flagged for one in of_scale], _prompts(of_scale), is_share=True)} if of_scale else {}
        for of_scale in by_scale
    ]
    metrics = [Metric(name=FLAGGED, text="share of pictures that the model's safety checker has blacked out", is_better="")]
    num_reference = None
    if len(complete) > 1:
        measuring = _Measuring(kept, folder, estimates, metrics, on_progress)
        if grade is not None:
            measuring.add_grades(grade, job, asked.grader or "")
        if asked.clip is not None:
            measuring.add_clip(ClipScores(asked.clip, asked.device))
        if asked.reference is not None:
            true = folder_items(asked.reference, "--reference")
            num_reference = len(true)
            if asked.inception is not None:
                measuring.add_distance(FID, Inception(asked.inception, asked.device), true, MIN_FID_PICTURES)
            measuring.add_distance(FD, SafetyCheckerSpace(asked.checker, asked.device), true, 2)
    failed = failed_rows(job, count)
    rows = [
        Row(
            scale=scale,
            num_pictures=len(by_scale[number]),
            num_failed=failed[number],
            num_flagged=sum(one.is_flagged for one in by_scale[number]),
            num_repeated=_num_repeated(by_scale[number]),
            num_measured=len(kept[number]),
            estimates=estimates[number],
        )
        for number, scale in enumerate(asked.scales)
    ]
    return Measured(
        num_prompts=len(prompts),
        num_prompts_measured=len(complete),
        num_reference=num_reference,
        metrics=metrics,
        rows=rows,
    )


class _Measuring:
    """Adds one metric after the other, for all scales."""

    def __init__(
        self,
        kept: Sequence[Sequence[Picture]],
        folder: Path,
        estimates: Sequence[dict[str, Estimate]],
        metrics: list[Metric],
        on_progress: Callable[[str], None],
    ) -> None:
        self._kept = kept
        self._folder = folder
        self._estimates = estimates
        self._metrics = metrics
        self._on_progress = on_progress

    def add_grades(self, grade: Grade, job: Path, name: str) -> None:
        figures: list[dict[str, list[float]]] = [defaultdict(list) for _ in self._kept]
        wanted = {one.path for of_scale in self._kept for one in of_scale}
        for line in lines_of(job):
            picture = picture_of(line, job, len(self._kept))
            if picture.path in wanted:
                for figure, value in graded(grade, line, picture.path).items():
                    figures[picture.scale_number][figure].append(value)
        self._on_progress(f"graded {len(wanted)} pictures")
        names = list(dict.fromkeys(figure for of_scale in figures for figure in of_scale))
        for figure in names:
            lists = [of_scale[figure] for of_scale in figures]
            if any(len(values) != len(kept) for values, kept in zip(lists, self._kept, strict=True)):
                raise InvalidRequestError("--grader", f"says {figure} of some pictures and not of others")
            is_share = all(value in (0.0, 1.0) for values in lists for value in values)
            self._add_means(figure, lists, is_share=is_share)
            kind = "share" if is_share else "mean"
            self._metrics.append(Metric(name=figure, text=f"{kind} that {name} says of the pictures", is_better="higher"))

    def add_clip(self, network: ClipScores) -> None:
        lists = [self._features(network, of_scale)[:, 0].tolist() for of_scale in self._kept]
        self._add_means(CLIP, lists, is_share=False)
        text = f"100 x cosine of CLIP's embeddings of picture and prompt, at least 0; {network.source}"
        self._metrics.append(Metric(name=CLIP, text=text, is_better="higher"))

    def add_distance(self, name: str, network: Inception | SafetyCheckerSpace, true: Sequence[Item], least: int) -> None:
        option = "--inception" if name == FID else "--reference"
        _check_enough(option, "the reference has", len(true), least)
        for of_scale in self._kept:
            _check_enough(option, "each scale has", len(of_scale), least)
        features = features_of(true, network, self._folder / "reference")
        reference = Reference(Normal.of(features))
        for of_scale, estimates in zip(self._kept, self._estimates, strict=True):
            seen = self._features(network, of_scale)

            def distance(counts: Ints | None, seen: Features = seen) -> float:
                return reference.distance(Normal.of(seen, counts))

            estimates[name] = figure_of(distance, _prompts(of_scale))
        floor, half = _between_halves(features)
        space = "FID's Inception network" if name == FID else "the model's own safety checker (CLIP image embeddings); not FID"
        text = f"squared Fréchet distance from {len(true)} reference pictures in the space of {space}; {network.source}"
        self._metrics.append(Metric(name=name, text=text, is_better="lower", floor=floor, floor_pictures=half))

    def _add_means(self, name: str, lists: Sequence[Sequence[float]], *, is_share: bool) -> None:
        for values, of_scale, estimates in zip(lists, self._kept, self._estimates, strict=True):
            estimates[name] = mean_of(values, _prompts(of_scale), is_share=is_share)

    def _features(self, network: Network, pictures: Sequence[Picture]) -> Features:
        items = [Item(one.path, one.sha256, one.prompt) for one in pictures]
        place = self._folder / f"scale-{pictures[0].scale_number}"
        found = features_of(items, network, place)
        self._on_progress(f"{network.name}: {len(found)} pictures of scale {pictures[0].scale_number + 1} of {len(self._kept)}")
        return found


def _complete(pictures: Sequence[Picture], num_scales: int) -> set[int]:
    """The prompts that can be compared: at all scales there, with equally many pictures, none of them blacked out."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    blacked = set()
    for picture in pictures:
        counts[picture.prompt_number][picture.scale_number] += 1
        if picture.is_flagged:
            blacked.add(picture.prompt_number)
    return {number for number, by_scale in counts.items() if len(by_scale) == num_scales and number not in blacked}


def _check_enough(option: str, what: str, count: int, least: int) -> None:
    if count < least:
        raise InvalidRequestError(option, f"needs {least} pictures at least, and {what} {count}")


def _between_halves(features: Features) -> tuple[float | None, int | None]:
    """The distance between two random halves of the reference, and how many pictures each has."""
    half = len(features) // 2
    if half < 2:
        return None, None
    order = np.random.default_rng(0).permutation(len(features))
    first, second = features[order[:half]], features[order[half : 2 * half]]
    return Reference(Normal.of(first)).distance(Normal.of(second)), half


def _num_repeated(pictures: Sequence[Picture]) -> int:
    files = [one.sha256 for one in pictures if not one.is_flagged]
    return len(files) - len(set(files))


def _prompts(pictures: Sequence[Picture]) -> list[int]:
    return [picture.prompt_number for picture in pictures]
