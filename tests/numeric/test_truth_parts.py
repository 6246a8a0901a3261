"""A VAE and embeddings given beside a model do what diffusers does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, LatentConsistencyModelPipeline
from model_folders import copy_of_the_demo
from model_layouts import latent_consistency_model, words_that_the_text_encoder_does_not_know
from original_layout import vae_tensors
from plain_diffusers import LEVELS_OFF, faults, our_pictures, plain_picture, plain_pipeline, told
from safetensors.torch import save_file

from mii_serve.config import LimitsConfig
from mii_serve.engine.factory import native_engine
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.errors import ModelError
from mii_serve.models import AddedParts, LoadedModel, load_model
from mii_serve.models.quiet import quiet_libraries

pytestmark = pytest.mark.usefixtures("one_thread")

ENGINES = {"reference": ReferenceEngine, "native": native_engine}
FEW = {"num_inference_steps": 3, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return copy_of_the_demo(tmp_path_factory.mktemp("parts") / "model")


def load(folder: Path, *, allow_pickle: bool = False, **added: Any) -> LoadedModel:
    limits = LimitsConfig(min_size_px=32)
    settings = {"revision": None, "dtype": "fp32", "device": "cpu", "allow_pickle": allow_pickle, "limits": limits}
    return load_model(str(folder), added=AddedParts(**added), **settings)


def assert_drawn_alike(model: LoadedModel, pipeline: Any, **asked: Any) -> np.ndarray:
    expected = plain_picture(pipeline, **FEW, **asked)
    for name, engine in ENGINES.items():
        made = our_pictures(engine(model), {"asked": {**FEW, **asked}})
        wrong = faults({"asked": expected}, made, LEVELS_OFF[name])
        assert not wrong, f"{name}: {told(wrong)}"
    return expected


def test_a_vae_in_one_file_takes_the_place_of_the_models_own(folder: Path, tmp_path: Path) -> None:
    config = {"block_out_channels": (32,) * 4, "layers_per_block": 1, "scaling_factor": 0.18215}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    torch.manual_seed(7)
    vae = AutoencoderKL(**config, **blocks).eval()
    tensors = {name: tensor.contiguous().clone() for name, tensor in vae_tensors(vae).items()}
    bare = {name.removeprefix("first_stage_model."): tensor for name, tensor in tensors.items()}
    vae.save_pretrained(tmp_path / "configs")
    pipeline, own = plain_pipeline(folder), load(folder)
    for content in (tensors, bare):
        save_file(content, tmp_path / "vae.safetensors")
        model = load(folder, vae=tmp_path / "vae.safetensors")
        assert model.revision.startswith(f"{own.revision}+sha256:")
    with quiet_libraries():
        file = str(tmp_path / "vae.safetensors")
        pipeline.vae = AutoencoderKL.from_single_file(file, config=str(tmp_path / "configs"), local_files_only=True)
    assert_drawn_alike(model, pipeline)
    with pytest.raises(ModelError, match=r"is in the layout of diffusers\. Give its folder"):
        load(folder, vae=tmp_path / "configs" / "diffusion_pytorch_model.safetensors")


def test_an_autoencoder_tiny_takes_the_place_of_the_models_own(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(8)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4,
        decoder_block_out_channels=(16,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    pipeline = plain_pipeline(folder)
    pipeline.vae = vae
    assert_drawn_alike(load(folder, vae=tmp_path), pipeline)  # the folder that holds vae/


def test_what_is_no_vae_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a UNet2DConditionModel; expected a VAE, that is AutoencoderKL or AutoencoderTiny"):
        load(folder, vae=folder / "unet")
    with pytest.raises(ModelError, match="neither a folder nor a file of weights"):
        load(folder, vae=tmp_path / "missing.safetensors")
    save_file({"x.lora_up.weight": torch.zeros(4, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match="is a LoRA"):
        load(folder, vae=tmp_path / "lora.safetensors")


def test_embeddings_are_words_of_prompts(folder: Path, tmp_path: Path) -> None:
    pipeline = plain_pipeline(folder)
    width = pipeline.text_encoder.config.hidden_size
    generator = torch.Generator().manual_seed(5)
    cat, style = (torch.randn(count, width, generator=generator) for count in (3, 1))
    save_file({"emb_params": cat}, tmp_path / "cat.safetensors")
    torch.save({"<anything>": style[0]}, tmp_path / "learned_embeds.bin")
    given = {"<my-cat>": tmp_path / "cat.safetensors", "my_style": tmp_path}
    with pytest.raises(ModelError, match="allow_pickle"):
        load(folder, embeddings=given)
    model = load(folder, embeddings=given, allow_pickle=True)
    with quiet_libraries():
        pipeline.load_textual_inversion(cat, token="<my-cat>")
        pipeline.load_textual_inversion(style[0], token="my_style")
    drawn = assert_drawn_alike(model, pipeline, prompt="a <my-cat> in my_style", negative_prompt="<my-cat>")
    fresh = load(folder, embeddings=given, allow_pickle=True)  # the engine before has changed the memory format of the other
    other = assert_drawn_alike(fresh, pipeline, prompt="a circle in my_style")
    assert (drawn != other).any()
    assert len(set(model.pipeline.tokenizer.tokenize("<my-cat> <my-cat>_1 my_style"))) == 3


def test_an_embedding_fills_in_a_word_that_the_model_only_names(folder: Path, tmp_path: Path) -> None:
    named = copy_of_the_demo(tmp_path / "named")
    words_that_the_text_encoder_does_not_know(named)
    width = load(folder).pipeline.text_encoder.config.hidden_size
    vector = torch.linspace(-1, 1, width)
    save_file({"<my-cat>": vector}, tmp_path / "cat.safetensors")
    encoder = load(named, embeddings={"<my-cat>": tmp_path / "cat.safetensors"}).pipeline
    number = encoder.tokenizer.convert_tokens_to_ids("<my-cat>")
    assert torch.equal(encoder.text_encoder.get_input_embeddings().weight[number], vector)
    for token, told_as in (("circle</w>", "is a token of the model already"), ("<|endoftext|>", "already. Choose another")):
        with pytest.raises(ModelError, match=told_as):
            load(folder, embeddings={token: tmp_path / "cat.safetensors"})
    save_file({"<my-cat>": torch.zeros(2, width + 1)}, tmp_path / "wide.safetensors")
    with pytest.raises(ModelError, match=rf"has vectors of {width + 1} numbers, and the model's text encoder takes {width}"):
        load(folder, embeddings={"<my-cat>": tmp_path / "wide.safetensors"})


def test_a_latent_consistency_model_draws_as_its_own_pipeline_does_when_nothing_is_said(tmp_path: Path) -> None:
    folder = copy_of_the_demo(tmp_path / "lcm")
    latent_consistency_model(folder)
    with quiet_libraries():
        pipeline = LatentConsistencyModelPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    scales = (1.0, 3.1, 12.7)
    expected = {"default": plain_picture(pipeline)} | {
        str(scale): plain_picture(pipeline, guidance_scale=scale, num_inference_steps=2) for scale in scales
    }
    asked = {"default": {}} | {str(scale): {"guidance_scale": scale, "num_inference_steps": 2} for scale in scales}
    for name, engine in ENGINES.items():
        wrong = faults(expected, our_pictures(engine(load(folder)), asked), LEVELS_OFF[name])
        assert not wrong, f"{name}: {told(wrong)}"
