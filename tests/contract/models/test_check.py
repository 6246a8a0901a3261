"""Every way a model folder can be wrong has its own message, before anything of it is loaded."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mii_serve.errors import ModelError
from mii_serve.models.check import check_folder

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"

EditFile = Callable[[Path, Callable[[dict[str, Any]], None]], None]


def refused(folder: Path, **settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        check_folder(folder, **{"dtype": "fp32", **settings})
    return str(caught.value)


def test_a_whole_folder_passes_and_lists_every_file_it_is_loaded_from(pristine: Path) -> None:
    checked = check_folder(pristine, dtype="fp32")
    named = {file.relative_to(pristine).as_posix() for file in checked.files}
    on_disk = {file.relative_to(pristine).as_posix() for file in pristine.rglob("*") if file.is_file()}
    assert named == on_disk
    assert checked.parts["scheduler"].class_name == "PNDMScheduler"


def test_a_folder_without_a_model_index_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path)
    assert str(tmp_path) in message
    assert "no model_index.json" in message


def test_a_model_one_level_down_is_suggested(model_folder: Path) -> None:
    assert f"Did you mean {model_folder}?" in refused(model_folder.parent)


def test_a_folder_with_little_more_than_an_unfinished_download_says_so(tmp_path: Path) -> None:
    leftover = tmp_path / ".cache/huggingface/download/abc.incomplete"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    assert "interrupted" in refused(tmp_path)


def test_a_folder_with_a_single_file_checkpoint_says_to_give_that_file(tmp_path: Path) -> None:
    (tmp_path / "v1-5-pruned.ckpt").touch()
    assert f"give that file: {tmp_path / 'v1-5-pruned.ckpt'}" in refused(tmp_path)


def test_another_pipeline_is_named_with_the_one_supported(model_folder: Path, edit: EditFile) -> None:
    edit(model_folder / "model_index.json", lambda index: index.update(_class_name="StableDiffusionXLPipeline"))
    message = refused(model_folder)
    assert "StableDiffusionXLPipeline" in message
    assert "only StableDiffusionPipeline is supported" in message


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("unet", ["my_module", "UNet2DConditionModel"]),
        ("unet", ["diffusers", "UNet3DConditionModel"]),
        ("text_encoder", ["transformers", "T5EncoderModel"]),
        ("scheduler", ["scheduling_mine", "PNDMScheduler"]),
        ("scheduler", ["diffusers", "DiffusionPipeline"]),
        ("safety_checker", ["diffusers_modules", "StableDiffusionSafetyChecker"]),
        ("vae", ["diffusers", "AutoencoderKL", "extra"]),
    ],
)
def test_a_class_that_is_no_part_of_the_pipeline_is_refused(
    model_folder: Path, edit: EditFile, part: str, entry: list[str]
) -> None:
    edit(model_folder / "model_index.json", lambda index: index.update({part: entry}))
    message = refused(model_folder)
    assert f"{part}" in message
    assert ".".join(entry) in message


def test_a_part_that_text_to_image_does_not_use_is_left_out_and_told(
    model_folder: Path, edit: EditFile, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"], "unused": [None, None], "sizes": [1, 2]}
    edit(model_folder / "model_index.json", lambda index: index.update(more))
    assert "image_encoder" not in check_folder(model_folder, dtype="fp32").parts
    assert [record.getMessage() for record in caplog.records] == [f"{model_folder}: not used, and not loaded: image_encoder"]


def write_header(file: Path, **shapes: list[int]) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()})
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())


def test_a_folder_that_is_something_else_is_told_what_it_is(model_folder: Path, tmp_path: Path) -> None:
    assert "It is a UNet2DConditionModel alone, one part of a model" in refused(model_folder / "unet")
    assert "It is a CLIPTextModel alone" in refused(model_folder / "text_encoder")
    other = tmp_path / "other"
    other.mkdir()
    assert "It holds nothing. Give the folder that holds model_index.json" in refused(other)
    write_header(other / "word.safetensors", **{"<cat>": [768]})
    assert "Its file word.safetensors is an embedding of textual inversion" in refused(other)
    write_header(other / "a.safetensors", **{"x.lora_down.weight": [4, 320]})
    assert "Its file a.safetensors is a LoRA" in refused(other)
    (other / "learned_embeds.bin").touch()
    assert "It is an embedding of textual inversion" in refused(other)
    (other / "pytorch_lora_weights.safetensors").touch()
    assert "It is a LoRA" in refused(other)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_model_index_that_is_no_json_object_is_refused(model_folder: Path, content: str) -> None:
    (model_folder / "model_index.json").write_bytes(content.encode("latin-1"))
    assert "model_index.json" in refused(model_folder)


def test_a_part_the_index_does_not_name_is_refused(model_folder: Path, edit: EditFile) -> None:
    edit(model_folder / "model_index.json", lambda index: index.update(vae=[None, None]))
    assert "names no vae" in refused(model_folder)


def test_a_checker_without_its_image_processor_is_refused(model_folder: Path, edit: EditFile) -> None:
    edit(model_folder / "model_index.json", lambda index: index.update(feature_extractor=[None, None]))
    assert "no feature_extractor" in refused(model_folder)


@pytest.mark.parametrize(
    "part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"]
)
def test_a_missing_part_is_named(model_folder: Path, part: str) -> None:
    shutil.rmtree(model_folder / part)
    assert f"no folder {part}/" in refused(model_folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "safety_checker"])
def test_a_part_without_weights_is_named(model_folder: Path, part: str) -> None:
    for file in (model_folder / part).glob("*.safetensors"):
        file.unlink()
    message = refused(model_folder)
    assert f"{part}: " in message
    assert "no weights" in message


@pytest.mark.parametrize(
    "file",
    ["unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt"],
)
def test_a_missing_small_file_is_named(model_folder: Path, file: str) -> None:
    (model_folder / file).unlink()
    assert Path(file).name in refused(model_folder)


@pytest.mark.parametrize("where", [".", "unet"])
def test_a_half_downloaded_folder_is_refused(model_folder: Path, where: str) -> None:
    (model_folder / where / "diffusion_pytorch_model.safetensors.incomplete").touch()
    assert "interrupted" in refused(model_folder)


def test_an_interrupted_download_explains_a_missing_part(model_folder: Path) -> None:
    shutil.rmtree(model_folder / "vae")
    leftover = model_folder / ".cache/huggingface/download/vae/abc.incomplete"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    message = refused(model_folder)
    assert "vae" in message
    assert "interrupted" in message


@pytest.mark.parametrize("file", [UNET_WEIGHTS, "tokenizer/vocab.json", "unet/config.json", "model_index.json"])
def test_a_git_lfs_pointer_is_recognised(model_folder: Path, file: str) -> None:
    (model_folder / file).write_text(POINTER)
    message = refused(model_folder)
    assert str(model_folder / file) in message
    assert "git lfs pull" in message


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, -1])
def test_weights_cut_short_are_found_by_their_header(model_folder: Path, kept_bytes: int) -> None:
    file = model_folder / UNET_WEIGHTS
    file.write_bytes(file.read_bytes()[:kept_bytes])
    message = refused(model_folder)
    assert str(file) in message
    assert "cut short" in message or "damaged" in message


@pytest.mark.parametrize("header", [b"not json", b"[]", b'{"a": {}}', b'{"a": {"data_offsets": []}}'])
def test_weights_with_an_unreadable_header_are_refused(model_folder: Path, header: bytes) -> None:
    (model_folder / UNET_WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    assert "not a safetensors file" in refused(model_folder)


def shard(folder: Path, index: object) -> None:
    (folder / UNET_WEIGHTS).rename(folder / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_missing_shards_are_named(model_folder: Path) -> None:
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shard(model_folder, {"weight_map": {"a": names[0], "b": names[1]}})
    message = refused(model_folder)
    assert names[1] in message
    assert names[0] not in message


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": {}}, {"weight_map": {"a": "../vae/model.safetensors"}}, {"weight_map": {"a": 1}}]
)
def test_an_index_that_names_no_files_beside_it_is_refused(model_folder: Path, index: object) -> None:
    shard(model_folder, index)
    assert "index.json" in refused(model_folder)


def test_pickles_are_refused_with_a_way_out_unless_allowed(model_folder: Path) -> None:
    (model_folder / UNET_WEIGHTS).rename(model_folder / "unet/diffusion_pytorch_model.bin")
    message = refused(model_folder)
    assert "allow_pickle" in message
    assert "save_pretrained" in message
    unet = check_folder(model_folder, dtype="fp32", allow_pickle=True).parts["unet"]
    assert unet.weights is not None
    assert unet.weights.is_pickle


def test_a_pickled_checker_alone_does_not_refuse_a_model(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    checker = model_folder / "safety_checker"
    (checker / "model.safetensors").rename(checker / "pytorch_model.bin")
    weights = check_folder(model_folder, dtype="fp32").parts["safety_checker"].weights
    assert weights is not None and weights.is_pickle
    assert "the safety_checker is a pickle, and is read without running code" in caplog.text


def test_safetensors_win_over_allowed_pickles(model_folder: Path) -> None:
    (model_folder / "unet/diffusion_pytorch_model.bin").touch()
    unet = check_folder(model_folder, dtype="fp32", allow_pickle=True).parts["unet"]
    assert unet.weights is not None
    assert not unet.weights.is_pickle


@pytest.mark.parametrize(("dtype", "variant"), [("fp32", None), ("bf16", None), ("fp16", "fp16")])
def test_the_half_precision_variant_is_used_for_fp16_alone(model_folder: Path, dtype: str, variant: str | None) -> None:
    file = model_folder / UNET_WEIGHTS
    shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    unet = check_folder(model_folder, dtype=dtype).parts["unet"]  # type: ignore[arg-type]
    assert unet.weights is not None
    assert unet.weights.variant == variant


def test_the_half_precision_variant_serves_every_precision_where_there_is_no_other(model_folder: Path) -> None:
    file = model_folder / UNET_WEIGHTS
    file.rename(file.with_suffix(".fp16.safetensors"))
    unet = check_folder(model_folder, dtype="fp32").parts["unet"]
    assert unet.weights is not None
    assert unet.weights.variant == "fp16"


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("unet", {"in_channels": 8}, "in_channels is 8"),
        ("unet", {"out_channels": 8}, "out_channels is 8"),
        ("unet", {"cross_attention_dim": 768}, "cross_attention_dim is 768 but text_encoder hidden_size is 16"),
        ("unet", {"cross_attention_dim": [16, 8]}, "cross_attention_dim is [16, 8]"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet", {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type"),
        ("vae", {"block_out_channels": [4, 4, 4]}, "scale factor is 4"),
        ("vae", {"latent_channels": 16}, "latent_channels is 16"),
    ],
)
def test_a_model_not_shaped_like_sd_v1_is_refused_by_the_number_that_differs(
    model_folder: Path, edit: EditFile, file: str, change: dict[str, Any], named: str
) -> None:
    edit(model_folder / file / "config.json", lambda config: config.update(change))
    assert named in refused(model_folder)


def test_a_checker_that_is_turned_off_need_not_be_there(model_folder: Path) -> None:
    shutil.rmtree(model_folder / "safety_checker")
    shutil.rmtree(model_folder / "feature_extractor")
    checked = check_folder(model_folder, dtype="fp32", enable_safety_checker=False)
    assert not {"safety_checker", "feature_extractor"} & set(checked.parts)
