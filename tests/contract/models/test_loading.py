"""A good folder becomes a genuine, uniform, quiet pipeline; a folder that only looks good is refused by name."""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mii_serve.config import LimitsConfig
from mii_serve.errors import ConfigError, ModelError
from mii_serve.models import LoadedModel
from mii_serve.types import GenerationDefaults

MODEL_PARTS = ("unet", "vae", "text_encoder", "safety_checker")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Load = Callable[..., LoadedModel]
EditFile = Callable[[Path, Callable[[dict[str, Any]], None]], None]


def weight_file(folder: Path, part: str) -> Path:
    (file,) = (folder / part).glob("*.safetensors")
    return file


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def tensors(model: LoadedModel, part: str) -> dict[str, torch.Tensor]:
    return dict(getattr(model.pipeline, part).state_dict())


def test_a_folder_becomes_a_working_pipeline_without_a_word(
    pristine: Path, load: Load, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffusers import StableDiffusionPipeline

    model = load(pristine)
    images = model.pipeline("a cat", num_inference_steps=2, height=64, width=64)
    assert type(model.pipeline) is StableDiffusionPipeline
    assert images.images[0].size == (64, 64)
    assert images.nsfw_content_detected is not None
    assert not any(module.training for part in MODEL_PARTS for module in getattr(model.pipeline, part).modules())
    assert capfd.readouterr() == ("", "")


def test_a_loaded_model_knows_its_name_revision_and_defaults(pristine: Path, load: Load) -> None:
    model = load(pristine, limits=LimitsConfig(max_images_per_prompt=3))
    assert model.name == "tiny"
    assert model.revision.startswith("sha256:")
    assert model.defaults == GenerationDefaults(scheduler="default", height=64, width=64)
    assert model.limits.max_images_per_prompt == 3


def test_declared_defaults_are_read_and_checked(model_folder: Path, load: Load) -> None:
    file = model_folder / "mii_serve_defaults.json"
    file.write_text(json.dumps({"scheduler": "euler", "num_inference_steps": 7}))
    defaults = load(model_folder).defaults
    assert (defaults.scheduler, defaults.num_inference_steps, defaults.height) == ("euler", 7, 64)
    file.write_text(json.dumps({"sampler": "euler"}))
    with pytest.raises(ModelError, match="no key 'sampler'"):
        load(model_folder)


def test_the_revision_follows_the_content_and_not_the_place(pristine: Path, model_folder: Path, load: Load) -> None:
    before = load(pristine).revision
    assert load(model_folder).revision == before
    (model_folder / "mii_serve_defaults.json").write_text(json.dumps({"num_inference_steps": 7}))
    with_defaults = load(model_folder).revision
    assert with_defaults != before
    rewrite(weight_file(model_folder, "vae"), lambda state: {name: value + 1 for name, value in state.items()})
    assert load(model_folder).revision not in (before, with_defaults)


def test_a_copied_snapshot_is_known_by_its_commit_and_its_content(pristine: Path, tmp_path: Path, load: Load) -> None:
    commit = "a" * 40
    folder = tmp_path / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(pristine, folder)
    model = load(folder)
    assert model.name == "org/tiny"
    assert model.revision == f"{commit}+{load(pristine).revision}", "a copy without links to blobs proves no commit"


@pytest.mark.parametrize("stored", ["fp32", "fp16"])
@pytest.mark.parametrize("asked", ["fp32", "fp16", "bf16"])
def test_every_part_ends_in_the_precision_asked_for(
    model_folder: Path, edit: EditFile, load: Load, stored: str, asked: str
) -> None:
    for part in MODEL_PARTS:
        rewrite(
            weight_file(model_folder, part),
            lambda state: {name: value.to(DTYPES[stored]) for name, value in state.items()},
        )
        if part in ("text_encoder", "safety_checker"):
            name = {"fp32": "float32", "fp16": "float16"}[stored]
            edit(model_folder / part / "config.json", lambda config, name=name: config.update(dtype=name, torch_dtype=name))  # type: ignore[misc]
    model = load(model_folder, dtype=asked)
    found = {value.dtype for part in MODEL_PARTS for value in tensors(model, part).values() if value.is_floating_point()}
    assert found == {DTYPES[asked]}


def test_weights_under_the_names_of_the_published_v1_4_files_are_all_used(
    pristine: Path, model_folder: Path, load: Load
) -> None:
    """Those files have the prefixes, attention names and buffers of the library versions of 2022."""

    def old_vae_name(name: str) -> str:
        if ".attentions." in name:
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                name = name.replace(new, old)
        return name

    def prefixed(state: dict[str, torch.Tensor], start: str, prefix: str, positions: int) -> dict[str, torch.Tensor]:
        renamed = {
            (prefix + name if name.startswith(start) and not name.startswith(prefix + start) else name): value
            for name, value in state.items()
        }
        inner = next(name for name in renamed if name.endswith("embeddings.position_embedding.weight"))
        renamed[inner.replace("position_embedding.weight", "position_ids")] = torch.arange(positions)[None]
        return renamed

    rewrite(weight_file(model_folder, "vae"), lambda state: {old_vae_name(n): value for n, value in state.items()})
    text = weight_file(model_folder, "text_encoder")
    if not any(name.startswith("text_model.") for name in load_file(text)):  # transformers 5 leaves the prefix out
        rewrite(text, lambda state: {f"text_model.{name}": value for name, value in state.items()})
    rewrite(text, lambda state: state | {"text_model.embeddings.position_ids": torch.arange(77)[None]})
    checker = weight_file(model_folder, "safety_checker")
    rewrite(checker, lambda state: prefixed(state, "vision_model.", "vision_model.", 5))

    new, old = load(pristine), load(model_folder)
    for part in MODEL_PARTS:
        expected, found = tensors(new, part), tensors(old, part)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_sharded_weights_are_read_whole(pristine: Path, model_folder: Path, load: Load) -> None:
    file = weight_file(model_folder, "unet")
    state = load_file(file)
    names = sorted(state)
    shards = {
        "diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
        "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2],
    }
    for shard, members in shards.items():
        save_file({name: state[name] for name in members}, file.with_name(shard), metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {n: shard for shard, ns in shards.items() for n in ns}}
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    expected, found = tensors(load(pristine), "unet"), tensors(load(model_folder), "unet")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_allowed_pickles_are_read(pristine: Path, model_folder: Path, load: Load) -> None:
    names = {"unet": "diffusion_pytorch_model.bin", "text_encoder": "pytorch_model.bin"}
    for part, name in names.items():
        file = weight_file(model_folder, part)
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    with pytest.raises(ModelError, match="allow_pickle"):
        load(model_folder)
    expected, found = load(pristine), load(model_folder, allow_pickle=True)
    for part in names:
        assert all(torch.equal(tensors(expected, part)[name], value) for name, value in tensors(found, part).items())


class _Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(("part", "name"), [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")])
def test_even_allowed_pickles_run_no_code(model_folder: Path, tmp_path: Path, load: Load, part: str, name: str) -> None:
    file = weight_file(model_folder, part)
    file.with_name(name).write_bytes(pickle.dumps({"conv_in.weight": _Bomb(tmp_path / "ran")}))
    file.unlink()
    with pytest.raises(ModelError, match=f"{part} in .* cannot be loaded"):
        load(model_folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", MODEL_PARTS)
def test_weights_that_lack_a_tensor_are_refused_by_part(model_folder: Path, load: Load, part: str) -> None:
    def without_one(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last = sorted(state)[-1]
        return {name: value for name, value in state.items() if name != last}

    rewrite(weight_file(model_folder, part), without_one)
    with pytest.raises(ModelError, match=f"^{part}: 1 tensors of .* missing"):
        load(model_folder)


@pytest.mark.parametrize("part", MODEL_PARTS)
def test_weights_of_another_shape_are_refused_by_part(model_folder: Path, load: Load, part: str) -> None:
    def widened(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last = sorted(state)[-1]
        return state | {last: torch.cat([state[last]] * 2)}

    rewrite(weight_file(model_folder, part), widened)
    with pytest.raises(ModelError, match=f"^{part} in .* cannot be loaded"):
        load(model_folder)


def test_a_tokenizer_of_another_model_is_refused(model_folder: Path, edit: EditFile, load: Load) -> None:
    edit(model_folder / "tokenizer/vocab.json", lambda vocab: vocab.update(extra=len(vocab)))
    with pytest.raises(ModelError, match="tokenizer knows"):
        load(model_folder)


def test_a_tokenizer_longer_than_the_encoder_is_refused(model_folder: Path, edit: EditFile, load: Load) -> None:
    edit(model_folder / "tokenizer/tokenizer_config.json", lambda config: config.update(model_max_length=78))
    with pytest.raises(ModelError, match="model_max_length"):
        load(model_folder)


@pytest.mark.parametrize("scheduler", ["NoSuchScheduler", "KarrasDiffusionScheduler"])
def test_a_scheduler_diffusers_does_not_have_is_refused(model_folder: Path, edit: EditFile, load: Load, scheduler: str) -> None:
    edit(model_folder / "model_index.json", lambda index: index.update(scheduler=["diffusers", scheduler]))
    with pytest.raises(ModelError, match=scheduler):
        load(model_folder)


def test_any_diffusers_scheduler_of_the_model_is_the_default(model_folder: Path, edit: EditFile, load: Load) -> None:
    name = "EulerDiscreteScheduler"
    edit(model_folder / "model_index.json", lambda index: index.update(scheduler=["diffusers", name]))
    model = load(model_folder)
    assert type(model.pipeline.scheduler).__name__ == name
    assert model.defaults.scheduler == "default"


@pytest.mark.skipif(importlib.util.find_spec("torchsde") is not None, reason="the package is here")
def test_a_scheduler_that_lacks_a_package_names_the_package(model_folder: Path, edit: EditFile, load: Load) -> None:
    edit(model_folder / "model_index.json", lambda index: index.update(scheduler=["diffusers", "DPMSolverSDEScheduler"]))
    with pytest.raises(ModelError, match="torchsde"):
        load(model_folder)


def test_a_model_without_a_checker_loads_and_says_so(
    model_folder: Path, edit: EditFile, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    edit(model_folder / "model_index.json", lambda index: index.update(safety_checker=[None, None]))
    shutil.rmtree(model_folder / "feature_extractor")  # of no use without a checker
    with caplog.at_level(logging.WARNING):
        model = load(model_folder)
    assert model.pipeline.safety_checker is None
    assert "has no safety checker" in caplog.text


def test_a_folder_the_system_cannot_read_is_a_model_error(pristine: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mii_serve.models.assembly.check_folder", fail)
    with pytest.raises(ModelError, match=r"cannot be read.*Permission denied"):
        load(pristine)


def test_a_checker_turned_off_is_dropped_and_it_is_logged(pristine: Path, load: Load, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = load(pristine, enable_safety_checker=False)
    assert model.pipeline.safety_checker is None
    assert "turned off" in caplog.text


@pytest.mark.parametrize("device", ["cuda:63", "nonsense"])
def test_a_device_that_is_not_there_is_a_setting_error(pristine: Path, load: Load, device: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        load(pristine, device=device)


def test_the_libraries_speak_again_afterwards(pristine: Path, load: Load) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    def state() -> list[object]:
        return [
            (library.get_verbosity(), library.is_progress_bar_enabled())
            for library in (diffusers_logging, transformers_logging)
        ]

    before = state()
    load(pristine)
    assert state() == before
