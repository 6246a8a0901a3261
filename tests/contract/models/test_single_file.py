"""A checkpoint in one file is the pipeline that diffusers' `from_single_file` makes of it with the same configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from original_layout import original_tensors, save_original
from plain_diffusers import LEVELS_OFF, faults, our_pictures, plain_picture
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mii_serve.engine.factory import native_engine
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.errors import ConfigError, ModelError
from mii_serve.models import AddedParts, LoadedModel
from mii_serve.models.families import SD_V1_4, SD_V2_1, PipelineShape
from mii_serve.models.quiet import quiet_libraries
from mii_serve.models.random_init import build_random_pipeline
from mii_serve.models.single_file.check import check_file
from mii_serve.models.single_file.configs import configs_of, write_configs
from mii_serve.models.single_file.contents import CONV_IN, family_of

Load = Callable[..., LoadedModel]
FEW = {"num_inference_steps": 2, "height": 64, "width": 64}


@dataclass(frozen=True)
class Checkpoint:
    """`folder` is the same pipeline as diffusers saves it."""

    file: Path
    folder: Path
    is_v2: bool

    @property
    def tokenizer(self) -> AddedParts:
        return AddedParts(tokenizer=self.folder / "tokenizer")


def build(folder: Path, tokenizer: Path, *, is_v2: bool) -> StableDiffusionPipeline:
    torch.manual_seed(2 if is_v2 else 1)
    pad = {"pad_token": "!"} if is_v2 else {}
    tokens = CLIPTokenizer.from_pretrained(tokenizer, **pad)
    channels = [64, 128] if is_v2 else [32, 64]
    heads: dict[str, Any] = (
        {"attention_head_dim": [1, 2], "use_linear_projection": True} if is_v2 else {"attention_head_dim": 8}
    )
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act="gelu" if is_v2 else "quick_gelu",
    )
    usual = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=96 if is_v2 else 64,
            block_out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=64,
            **heads,
        ),
        vae=AutoencoderKL(
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokens,
        scheduler=(
            DDIMScheduler(**usual, set_alpha_to_one=False, clip_sample=False, prediction_type="v_prediction")
            if is_v2
            else PNDMScheduler(**usual, set_alpha_to_one=False, skip_prk_steps=True)
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture(scope="module")
def checkpoints(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    def make(family: str) -> Checkpoint:
        place = tmp_path_factory.mktemp(family)
        is_v2 = family == "v2"
        pipeline = build(place / "folder", pristine / "tokenizer", is_v2=is_v2)
        return Checkpoint(save_original(pipeline, place / "my-model.safetensors", is_v2=is_v2), place / "folder", is_v2)

    with quiet_libraries():
        return {family: make(family) for family in ("v1", "v2")}


@pytest.fixture(params=["v1", "v2"])
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints[request.param]


@pytest.fixture
def v1(checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints["v1"]


def same_tensors(ours: Any, theirs: Any) -> bool:
    for part in ("unet", "vae", "text_encoder"):
        mine, other = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        if mine.keys() != other.keys() or not all(torch.equal(mine[name], other[name]) for name in mine):
            return False
    return True


def test_it_is_the_pipeline_of_from_single_file(checkpoint: Checkpoint, load: Load, tmp_path: Path) -> None:
    model = load(checkpoint.file, added=checkpoint.tokenizer)
    checked = check_file(checkpoint.file, allow_pickle=False, tokenizer=checkpoint.folder / "tokenizer")
    write_configs(checked.configs, checked.tokenizer, tmp_path / "configs")
    for configs in (tmp_path / "configs", checkpoint.folder):
        with quiet_libraries():
            theirs = StableDiffusionPipeline.from_single_file(str(checkpoint.file), config=str(configs), local_files_only=True)
        theirs.set_progress_bar_config(disable=True)
        assert same_tensors(model.pipeline, theirs)
        expected = {"default": plain_picture(theirs, **FEW)}
        assert not faults(expected, our_pictures(ReferenceEngine(model), {"default": FEW}), 0)
    assert not faults(expected, our_pictures(native_engine(model), {"default": FEW}), LEVELS_OFF["native"])
    assert model.name == "my-model"
    assert model.revision.startswith("sha256:")
    assert model.defaults.height == (768 if checkpoint.is_v2 else 512)


def test_half_precision_and_pickles_are_the_same_model(v1: Checkpoint, load: Load, tmp_path: Path) -> None:
    halves = {name: t.half() if t.is_floating_point() else t for name, t in load_file(v1.file).items()}
    save_file(halves, tmp_path / "half.safetensors")
    torch.save({"state_dict": halves, "global_step": 5}, tmp_path / "half.ckpt")
    added = v1.tokenizer
    with pytest.raises(ModelError, match="allow_pickle"):
        load(tmp_path / "half.ckpt", added=added)
    half = load(tmp_path / "half.safetensors", added=added).pipeline
    assert same_tensors(half, load(tmp_path / "half.ckpt", added=added, allow_pickle=True).pipeline)
    assert half.unet.dtype == half.text_encoder.dtype == torch.float32
    assert torch.equal(half.unet.conv_in.weight.half(), halves["model.diffusion_model.input_blocks.0.0.weight"])


def test_an_unreadable_pickle_says_so(v1: Checkpoint, load: Load, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "callbacks": Checkpoint}, tmp_path / "odd.ckpt")
    with pytest.raises(ModelError, match="cannot be read without running code"):
        load(tmp_path / "odd.ckpt", allow_pickle=True)


def test_what_the_unet_predicts_is_read_beside_the_file_and_in_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def prediction(file: Path) -> tuple[str, int]:
        configs = check_file(file, allow_pickle=False, tokenizer=checkpoint.folder / "tokenizer").configs
        return configs.scheduler.get("prediction_type", "epsilon"), configs.unet["sample_size"]

    is_v2 = checkpoint.is_v2
    own = ("v_prediction", 96) if is_v2 else ("epsilon", 64)
    assert prediction(checkpoint.file) == own
    file = tmp_path / "other.safetensors"
    save_file(load_file(checkpoint.file), file, {"modelspec.prediction_type": "epsilon"})
    assert prediction(file) == ("epsilon", 64)
    (tmp_path / "other.yaml").write_text("model: {params: {parameterization: v}}")
    assert prediction(file) == ("v_prediction", 96 if is_v2 else 64)
    (tmp_path / "other.yaml").write_text("model: {}")
    with pytest.raises(ModelError, match=r"other\.yaml"):
        prediction(file)


def test_the_tokenizer_is_found_beside_the_file_or_asked_for(
    v1: Checkpoint, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pristine: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    file = tmp_path / "model.safetensors"
    file.hardlink_to(v1.file)
    with pytest.raises(ModelError, match=r"has no tokenizer.*--tokenizer FOLDER"):
        load(file)
    with pytest.raises(ModelError, match=r"is no folder with tokenizer\.json or vocab\.json with merges\.txt"):
        load(file, added=AddedParts(tokenizer=tmp_path))
    (tmp_path / "tokenizer").symlink_to(pristine / "tokenizer")
    assert load(file).revision == load(file, added=AddedParts(tokenizer=pristine)).revision
    vocabulary = json.loads((pristine / "tokenizer" / "vocab.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "vocab.json").write_text(json.dumps({token: i for token, i in vocabulary.items() if token != "q"}))
    (other / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ModelError, match="They are of different models"):
        load(file, added=AddedParts(tokenizer=other))


def test_a_file_that_is_not_whole_is_refused(v1: Checkpoint, load: Load, tmp_path: Path) -> None:
    tensors = load_file(v1.file)
    last = "model.diffusion_model.middle_block.2.out_layers.3.weight"
    save_file({name: t for name, t in tensors.items() if name != last}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"1 tensors of the UNet2D.* missing.*mid_block\.resnets\.1\.conv2\.weight"):
        load(tmp_path / "a.safetensors", added=v1.tokenizer)
    save_file({**tensors, last: torch.zeros(3, 3)}, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match="has the shape"):
        load(tmp_path / "b.safetensors", added=v1.tokenizer)


def test_an_inpainting_checkpoint_keeps_its_nine_channels(v1: Checkpoint, load: Load, tmp_path: Path) -> None:
    tensors = load_file(v1.file)
    own = tensors[CONV_IN]
    tensors[CONV_IN] = torch.cat([own, torch.ones(own.shape[0], 5, *own.shape[2:])], dim=1)
    save_file(tensors, tmp_path / "inpainting.safetensors")
    unet = load(str(tmp_path / "inpainting.safetensors"), added=v1.tokenizer).pipeline.unet
    assert unet.config.in_channels == 9 and torch.equal(unet.conv_in.weight, tensors[CONV_IN])


def test_a_v2_inpainting_checkpoint_predicts_noise(checkpoints: dict[str, Checkpoint]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(checkpoints["v2"].file).items()}
    shapes[CONV_IN] = (shapes[CONV_IN][0], 9, *shapes[CONV_IN][2:])
    configs = configs_of(shapes, family_of(shapes, "a file"), "a file")
    assert (configs.scheduler["prediction_type"], configs.unet["in_channels"]) == ("epsilon", 9)


def test_a_folder_has_a_tokenizer_of_its_own(pristine: Path, load: Load) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        load(pristine, added=AddedParts(tokenizer=pristine))


@pytest.mark.parametrize(("family", "shape"), [("v1", SD_V1_4), ("v2", SD_V2_1)])
def test_a_real_checkpoint_gets_the_published_configurations(family: Any, shape: PipelineShape, pristine: Path) -> None:
    pipeline = build_random_pipeline(
        shape,
        tokenizer_folder=pristine / "tokenizer",
        dtype=torch.float32,
        device=torch.device("meta"),
        enable_safety_checker=False,
    )
    shapes = {name: tuple(t.shape) for name, t in original_tensors(pipeline, is_v2=family == "v2").items()}
    assert family_of(shapes, "x") == family
    configs = configs_of(shapes, family, "x")
    for part in ("unet", "vae", "text_encoder"):
        known, found = getattr(shape, part), getattr(configs, part)
        assert {name: found[name] for name in known} == known
    assert configs.unet["use_linear_projection"] == (family == "v2")
    assert configs.scheduler.get("prediction_type", "epsilon") == ("v_prediction" if family == "v2" else "epsilon")
