"""Inspects a single file before any tensor of it is used: what is it, is it whole, where is its tokenizer?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mii_serve.models.architecture import check_architecture
from mii_serve.models.single_file.configs import FileConfigs, configs_of, prediction_beside, prediction_in
from mii_serve.models.single_file.contents import family_of
from mii_serve.models.single_file.files import WeightsFile, read_file
from mii_serve.models.single_file.tokenizer import find_tokenizer, tokenizer_files


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedFile:
    """A checkpoint that can be loaded. `others` are the files beside it that change its pictures, by their names."""

    weights: WeightsFile
    configs: FileConfigs
    tokenizer: Path
    others: Mapping[str, Path]

    @property
    def files(self) -> dict[str, Path]:
        """All that it is loaded from, by names that do not depend on where they are."""
        tokenizer = {f"tokenizer/{file.name}": file for file in tokenizer_files(self.tokenizer)}
        return {"model": self.weights.path, **tokenizer, **self.others}


def check_file(path: Path, *, allow_pickle: bool, tokenizer: Path | None) -> CheckedFile:
    """Inspect the file.

    Raises:
        ModelError: the first thing found wrong, where it is, and what to do.
    """
    weights = read_file(path, allow_pickle=allow_pickle)
    family = family_of(weights.shapes, str(path))
    prediction, beside = prediction_beside(path)
    if prediction is None:
        prediction = prediction_in(weights.metadata)
    configs = configs_of(weights.shapes, family, str(path), prediction=prediction)
    check_architecture({"unet": configs.unet, "vae": configs.vae, "text_encoder": configs.text_encoder}, str(path))
    return CheckedFile(
        weights=weights,
        configs=configs,
        tokenizer=find_tokenizer(path, tokenizer),
        others={"model.yaml": beside} if beside else {},
    )
