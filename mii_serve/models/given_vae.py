"""A VAE that takes the place of the model's own (`--vae PATH`): a folder, or a single file in the original layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL

from mii_serve.errors import ModelError
from mii_serve.models.architecture import check_vae
from mii_serve.models.check import Part, check_vae_folder
from mii_serve.models.families import SD_V1_4
from mii_serve.models.loading import TORCH_DTYPES, load_part
from mii_serve.models.single_file.configs import vae_sizes
from mii_serve.models.single_file.contents import VAE, is_vae, what_else
from mii_serve.models.single_file.files import ENDINGS, WeightsFile, read_file
from mii_serve.models.single_file.loading import filled
from mii_serve.models.single_file.names import vae_sources

if TYPE_CHECKING:
    from mii_serve.models import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenVae:
    """One that can be loaded; `source` is its folder or its file."""

    path: Path
    source: Part | WeightsFile

    @property
    def files(self) -> Mapping[str, Path]:
        """All that it is loaded from, by names that do not depend on where they are."""
        if isinstance(self.source, Part):
            return {f"vae/{file.name}": file for file in self.source.files}
        return {"vae": self.source.path}

    def load(self, *, dtype: Precision, device: torch.device) -> Any:
        """
        Raises:
            ModelError
        """
        if isinstance(self.source, Part):
            return load_part(self.source, dtype=dtype, device=device)
        prefix, config = _prefix(self.source), _config(self.source)
        names = vae_sources(self.source.shapes, num_levels=len(config["block_out_channels"]), prefix=prefix)
        with self.source.opened() as content:
            vae = filled(AutoencoderKL, config, names, content, TORCH_DTYPES[dtype], str(self.path))
        return vae.to(device=device).requires_grad_(False).eval()


def find_vae(path: Path, *, dtype: Precision, allow_pickle: bool) -> GivenVae:
    """
    Raises:
        ModelError: it is no VAE that can be used.
    """
    path = path.expanduser().absolute()
    if path.is_dir():
        folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
        if not (folder / "config.json").is_file():
            raise ModelError(f"vae: {path} holds neither config.json nor vae/config.json. Give a VAE's folder or file")
        return GivenVae(path=path, source=check_vae_folder(folder, dtype=dtype, allow_pickle=allow_pickle))
    if not path.is_file() or path.suffix not in ENDINGS:
        raise ModelError(f"vae: {path} is neither a folder nor a file of weights ({', '.join(ENDINGS)})")
    file = read_file(path, allow_pickle=allow_pickle)
    if not is_vae(file.shapes):
        found = what_else(file.shapes) or "no VAE alone"
        raise ModelError(f"vae: {path} is {found}")
    if any(".up_blocks." in name for name in file.shapes):
        raise ModelError(f"vae: {path} is in the layout of diffusers. Give its folder, with its config.json: {path.parent}")
    check_vae(_config(file), str(path))
    return GivenVae(path=path, source=file)


def _prefix(file: WeightsFile) -> str:
    return VAE if any(name.startswith(VAE) for name in file.shapes) else ""


def _config(file: WeightsFile) -> dict[str, Any]:
    try:
        return {**SD_V1_4.vae, **vae_sizes(file.shapes, _prefix(file))}
    except KeyError as error:
        raise ModelError(f"vae: {file.path} is not whole: it has no {error.args[0]}. Fetch or copy it again") from None
