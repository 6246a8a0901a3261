"""A rank's part of a UNet is what it would keep of the whole, read without the rest; what is wrong with the files is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mii_serve.errors import ConfigError, ModelError
from mii_serve.models import LoadedModel
from mii_serve.models.tensor_parallel import TensorShard, cut_state_dict

Load = Callable[..., LoadedModel]

SECOND = TensorShard(rank=1, world_size=2)


def unet_file(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def save_unet(folder: Path, **options: Any) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet_file(folder).unlink()
    unet.save_pretrained(folder / "unet", **options)


def assert_same(found: Any, expected: dict[str, torch.Tensor]) -> None:
    tensors = found.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), "its own memory, no view of a file"
        assert not tensor.requires_grad


@pytest.mark.parametrize("rank", [0, 1])
def test_it_is_what_a_rank_would_keep_of_the_whole(pristine: Path, load: Load, rank: int) -> None:
    shard = TensorShard(rank=rank, world_size=2)
    whole, part = load(pristine), load(pristine, shard=shard)
    assert_same(part.pipeline.unet, cut_state_dict(whole.pipeline.unet.state_dict(), shard))
    assert not part.pipeline.unet.training
    assert part.pipeline.unet.config.block_out_channels == whole.pipeline.unet.config.block_out_channels
    assert part.revision == whole.revision, "the model's, not the rank's"
    assert_same(part.pipeline.vae, {name: tensor.clone() for name, tensor in whole.pipeline.vae.state_dict().items()})


def test_no_cut_tensor_is_read_whole(pristine: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from mii_serve.models import tensor_parallel

    largest: dict[str, int] = {}
    take = tensor_parallel._take

    def watched(stored: Any, name: str, *others: Any) -> torch.Tensor:
        assert not isinstance(stored, torch.Tensor)
        taken = take(stored, name, *others)
        largest[name] = taken.numel()
        return taken

    monkeypatch.setattr(tensor_parallel, "_take", watched)
    unet = load(pristine, shard=SECOND).pipeline.unet
    stored = load_file(unet_file(pristine))
    assert largest == {name: tensor.numel() for name, tensor in unet.state_dict().items()}
    assert sum(largest.values()) < 0.6 * sum(tensor.numel() for tensor in stored.values())


@pytest.mark.parametrize(
    ("options", "stored_as"),
    [({"max_shard_size": "40KB"}, "*-of-*.safetensors"), ({"safe_serialization": False}, "*.bin")],
    ids=["several files", "pickle"],
)
def test_other_ways_to_store_it(
    pristine: Path, model_folder: Path, load: Load, options: dict[str, Any], stored_as: str
) -> None:
    save_unet(model_folder, **options)
    assert list((model_folder / "unet").glob(stored_as))
    part = load(model_folder, shard=SECOND, allow_pickle=True).pipeline.unet
    assert_same(part, cut_state_dict(load(pristine).pipeline.unet.state_dict(), SECOND))


def test_it_is_in_the_precision_asked_for(pristine: Path, load: Load) -> None:
    part = load(pristine, dtype="bf16", shard=SECOND).pipeline.unet
    assert_same(part, cut_state_dict(load(pristine, dtype="bf16").pipeline.unet.state_dict(), SECOND))


def test_a_number_of_ranks_that_cannot_share_the_unet_is_refused(pristine: Path, load: Load) -> None:
    with pytest.raises(ConfigError, match="can be sharded over 2 ranks, got 3"):
        load(pristine, shard=TensorShard(rank=0, world_size=3))


def test_a_missing_tensor_is_named(model_folder: Path, load: Load) -> None:
    state = load_file(unet_file(model_folder))
    del state["conv_in.weight"]
    save_file(state, unet_file(model_folder), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"unet: 1 tensors .* missing .* conv_in\.weight"):
        load(model_folder, shard=SECOND)


def test_a_tensor_of_another_shape_is_named(model_folder: Path, load: Load) -> None:
    state = load_file(unet_file(model_folder))
    name = "mid_block.resnets.0.conv1.weight"
    state[name] = state[name][:8].clone()
    save_file(state, unet_file(model_folder), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"unet in .* cannot be loaded: {name} has the shape \[8, 16, 3, 3\]"):
        load(model_folder, shard=SECOND)


def test_tensors_that_the_unet_does_not_have_are_left_out(
    model_folder: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    state = load_file(unet_file(model_folder))
    save_file(state | {"extra": torch.zeros(1)}, unet_file(model_folder), metadata={"format": "pt"})
    load(model_folder, shard=SECOND)
    assert "1 tensors are not used, for example extra" in caplog.text
