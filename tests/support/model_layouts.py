"""Model folders as people have them, built from the demo model: each builder changes a copy of it in place.

What has to be said beside the folder is in the `Layout` that a builder returns: `plain` are arguments of `from_pretrained`,
`asked` is what the request says to both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from model_folders import (
    FP32,
    WEIGHTS,
    Builder,
    Layout,
    Tensors,
    edit,
    halves,
    index,
    keep,
    rewrite,
    scheduler,
    shard,
    threshold,
    weights,
    wrong,
)
from safetensors.torch import load_file

# ---- weights -------------------------------------------------------------------------------------------------------


def as_saved(folder: Path) -> None:
    pass


def fp16_files_only(folder: Path) -> Layout:
    for part in WEIGHTS:
        rewrite(weights(folder, part), halves, folder / part / f"{WEIGHTS[part]}.fp16.safetensors")
        weights(folder, part).unlink()
    return Layout(plain={"variant": "fp16", **FP32})


def fp16_files_beside_the_others(folder: Path) -> None:
    for part in WEIGHTS:
        rewrite(weights(folder, part), wrong, folder / part / f"{WEIGHTS[part]}.fp16.safetensors")


def stored_in_fp16(folder: Path) -> Layout:
    for part in WEIGHTS:
        rewrite(weights(folder, part), halves)
    return Layout(plain=FP32)


def unet_in_fp16_and_the_rest_in_fp32(folder: Path) -> Layout:
    rewrite(weights(folder, "unet"), halves)
    return Layout(plain=FP32)


def stored_in_bf16(folder: Path) -> Layout:
    for part in WEIGHTS:
        rewrite(weights(folder, part), lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    return Layout(plain=FP32)


def unet_in_shards(folder: Path) -> None:
    shard(folder, "unet")


def every_part_in_shards(folder: Path) -> None:
    for part in WEIGHTS:
        shard(folder, part)


def pickles(folder: Path) -> Layout:
    for part in WEIGHTS:
        stem = "pytorch_model" if WEIGHTS[part] == "model" else WEIGHTS[part]
        torch.save(load_file(weights(folder, part)), folder / part / f"{stem}.bin")
        weights(folder, part).unlink()
    return Layout(plain={"use_safetensors": False}, allow_pickle=True)


def pickles_beside_safetensors(folder: Path) -> Layout:
    for part in WEIGHTS:
        stem = "pytorch_model" if WEIGHTS[part] == "model" else WEIGHTS[part]
        torch.save(wrong(load_file(weights(folder, part))), folder / part / f"{stem}.bin")
    return Layout(allow_pickle=True)


def vae_with_old_names(folder: Path) -> None:
    """As Stable Diffusion v1-4 and v1-5 have them."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: Tensors) -> Tensors:
        renamed = {}
        for name, tensor in tensors.items():
            for new, before in old.items():
                if f"attentions.0.{new}." in name:
                    name = name.replace(f".{new}.", f".{before}.")
            renamed[name] = tensor
        assert set(renamed) != set(tensors)
        return renamed

    rewrite(weights(folder, "vae"), rename)


def text_encoder_with_old_names(folder: Path) -> None:
    """With its prefix, and position ids that are a buffer no more."""

    def rename(tensors: Tensors) -> Tensors:
        renamed = {name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in tensors.items()}
        return renamed | {"text_model.embeddings.position_ids": torch.arange(77)[None]}

    rewrite(weights(folder, "text_encoder"), rename)


def tensors_that_nobody_needs(folder: Path) -> None:
    for part in ("unet", "vae"):
        rewrite(weights(folder, part), lambda tensors: tensors | {"model_ema.decay": torch.ones(3)})


# ---- the safety checker --------------------------------------------------------------------------------------------


def no_checker(folder: Path) -> None:
    index(folder, safety_checker=[None, None], feature_extractor=[None, None], requires_safety_checker=False)
    for part in ("safety_checker", "feature_extractor"):
        shutil.rmtree(folder / part)


def no_checker_but_a_feature_extractor(folder: Path) -> None:
    index(folder, safety_checker=[None, None])
    shutil.rmtree(folder / "safety_checker")


def no_word_of_a_checker(folder: Path) -> None:
    edit(
        folder / "model_index.json",
        lambda content: [content.pop(key) for key in ("safety_checker", "feature_extractor", "requires_safety_checker")],
    )


def a_checker_that_fires(folder: Path) -> None:
    threshold(folder, -2.0)


def feature_extractor_of_old(folder: Path) -> None:
    def old(content: dict[str, Any]) -> None:
        content.pop("image_processor_type", None)
        side = content["crop_size"]["height"]
        content.update(feature_extractor_type="CLIPFeatureExtractor", size=side, crop_size=side)

    edit(folder / "feature_extractor" / "preprocessor_config.json", old)


# ---- schedulers and configurations ---------------------------------------------------------------------------------


def v_prediction(folder: Path) -> None:
    scheduler(folder, "DDIMScheduler", prediction_type="v_prediction", clip_sample=False, steps_offset=1)


def scheduler_config_of_2022(folder: Path) -> None:
    scheduler(folder, "PNDMScheduler", skip_prk_steps=True)


def ddim_of_2022(folder: Path) -> None:
    scheduler(folder, "DDIMScheduler")


def class_in_the_index_wins(folder: Path) -> None:
    scheduler(folder, "EulerDiscreteScheduler", steps_offset=1)
    edit(folder / "scheduler" / "scheduler_config.json", lambda content: content.update(_class_name="DDIMScheduler"))


def modern_scheduler(folder: Path) -> None:
    scheduler(folder, "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", use_karras_sigmas=True, steps_offset=1)


def model_index_of_2022(folder: Path) -> None:
    """As v1-1's: few keys, no requires_safety_checker, no image_encoder, the class of the time."""
    edit(
        folder / "model_index.json",
        lambda content: keep(content, "_class_name", "scheduler", "text_encoder", "tokenizer", "unet", "vae", "safety_checker"),
    )
    index(folder, _diffusers_version="0.2.2", feature_extractor=["transformers", "CLIPFeatureExtractor"])


def unet_config_of_2022(folder: Path) -> Layout:
    """Its size is taken for 64, as diffusers does with old ones; the request says another."""
    wanted = "_class_name act_fn attention_head_dim block_out_channels center_input_sample cross_attention_dim down_block_types"
    more = "downsample_padding flip_sin_to_cos freq_shift in_channels layers_per_block mid_block_scale_factor norm_eps"
    last = "norm_num_groups out_channels sample_size up_block_types"
    edit(folder / "unet" / "config.json", lambda content: keep(content, *wanted.split(), *more.split(), *last.split()))
    edit(folder / "unet" / "config.json", lambda content: content.update(_diffusers_version="0.2.2"))
    return Layout(asked={"height": 64, "width": 96})


def default_size_of_an_old_unet(folder: Path) -> Layout:
    edit(folder / "unet" / "config.json", lambda content: content.update(_diffusers_version="0.2.2"))
    return Layout(asked={"num_inference_steps": 1})


def vae_config_of_2022(folder: Path) -> None:
    wanted = "_class_name act_fn block_out_channels down_block_types in_channels latent_channels layers_per_block"
    more = "norm_num_groups out_channels sample_size up_block_types"
    edit(folder / "vae" / "config.json", lambda content: keep(content, *wanted.split(), *more.split()))


def another_scaling_factor(folder: Path) -> None:
    edit(folder / "vae" / "config.json", lambda content: content.update(scaling_factor=0.2))


def size_as_a_list(folder: Path) -> None:
    edit(folder / "unet" / "config.json", lambda content: content.update(sample_size=[8, 12]))


def heads_as_a_list(folder: Path) -> None:
    edit(folder / "unet" / "config.json", lambda content: content.update(attention_head_dim=[4, 4]))


def keys_that_nobody_knows(folder: Path) -> None:
    for part, file in (("unet", "config"), ("vae", "config"), ("scheduler", "scheduler_config"), ("text_encoder", "config")):
        edit(folder / part / f"{file}.json", lambda content: content.update(_name_or_path="/home/someone/x", an_option=[1]))
    index(folder, _name_or_path="/home/someone/x")


def one_text_layer_less(folder: Path) -> None:
    """What people do for "clip skip"."""
    edit(folder / "text_encoder" / "config.json", lambda content: content.update(num_hidden_layers=1))


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def saved_again_by_transformers(folder: Path, **options: Any) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"), **options)
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(str(folder / "tokenizer"))


def tokenizer_json_only(folder: Path) -> None:
    saved_again_by_transformers(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)


def both_kinds_of_tokenizer_files(folder: Path) -> None:
    kept = {name: (folder / "tokenizer" / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    saved_again_by_transformers(folder)
    for name, content in kept.items():
        (folder / "tokenizer" / name).write_bytes(content)


def tokenizer_config_of_2022(folder: Path) -> None:
    def token(content: str) -> dict[str, Any]:
        about = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content, **about}

    start, end = "<|startoftext|>", "<|endoftext|>"
    config = {
        "add_prefix_space": False,
        "bos_token": token(start),
        "do_lower_case": True,
        "eos_token": token(end),
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": end,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": token(end),
    }
    special = {name: {key: value for key, value in token(text).items() if key != "__type"} for name, text in SPECIAL.items()}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": end}))


SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def fast_tokenizer_in_the_index(folder: Path) -> None:
    saved_again_by_transformers(folder)
    index(folder, tokenizer=["transformers", "CLIPTokenizerFast"])


def words_added_to_the_tokenizer(folder: Path) -> Layout:
    """Textual inversion as its training script saves it: more tokens, and an embedding for each."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    added = tokenizer.add_tokens(["<my-cat>", "<my-dog>"])
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(str(folder / "tokenizer"))

    def grow(tensors: Tensors) -> Tensors:
        [name] = [name for name in tensors if name.endswith("token_embedding.weight")]
        fresh = tensors[name][:added].flip(1) * 3
        return tensors | {name: torch.cat([tensors[name], fresh])}

    rewrite(weights(folder, "text_encoder"), grow)
    edit(folder / "text_encoder" / "config.json", lambda content: content.update(vocab_size=len(tokenizer)))
    return Layout(asked={"prompt": "a <my-cat> beside a <my-dog>"})


def words_in_added_tokens_json(folder: Path) -> Layout:
    """The same with the file of older versions beside vocabulary and merges."""
    kept = {name: (folder / "tokenizer" / name).read_bytes() for name in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    layout = words_added_to_the_tokenizer(folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    for name, content in kept.items():
        (folder / "tokenizer" / name).write_bytes(content)
    first = len(json.loads(kept["vocab.json"]))
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<my-cat>": first, "<my-dog>": first + 1}))
    return layout


def padded_with_another_token(folder: Path) -> None:
    edit(folder / "tokenizer" / "tokenizer_config.json", lambda content: content.update(pad_token="!"))


def words_that_the_text_encoder_does_not_know(folder: Path) -> None:
    """Added to the tokenizer alone; their embeddings are in a file of their own, which `from_pretrained` does not read."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    tokenizer.add_tokens(["<my-cat>", "<my-dog>"])
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(str(folder / "tokenizer"))


# ---- other pipelines -----------------------------------------------------------------------------------------------


def index_of_image_to_image(folder: Path) -> Layout:
    """Diffusers is told to do without the part that is in the index and not in the folder."""
    index(folder, _class_name="StableDiffusionImg2ImgPipeline", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    return Layout(plain={"image_encoder": None})


def latent_consistency_model(folder: Path) -> Layout:
    """Its UNet takes the guidance scale in, and makes no second row of it."""
    edit(folder / "unet" / "config.json", lambda content: content.update(time_cond_proj_dim=33))

    def take_guidance_in(tensors: Tensors) -> Tensors:
        width = tensors["time_embedding.linear_1.weight"].shape[1]
        made = torch.randn(width, 33, generator=torch.Generator().manual_seed(1))
        return tensors | {"time_embedding.cond_proj.weight": made * 0.1}

    rewrite(weights(folder, "unet"), take_guidance_in)
    scheduler(folder, "LCMScheduler", clip_sample=False, steps_offset=1)
    index(folder, _class_name="LatentConsistencyModelPipeline", requires_safety_checker=True)
    return Layout(asked={"guidance_scale": 6.3, "negative_prompt": "which it does not read"})


def safe_stable_diffusion_with_a_pickled_checker(folder: Path) -> Layout:
    """Diffusers no longer has that pipeline's checker, and is shown the same folder with the usual one."""
    file = weights(folder, "safety_checker")
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    safe = folder.parent / "safe"
    safe.mkdir()
    for path in folder.iterdir():
        (safe / path.name).symlink_to(path)
    (safe / "model_index.json").unlink()
    shutil.copy(folder / "model_index.json", safe)
    checker = ["stable_diffusion_safe", "SafeStableDiffusionSafetyChecker"]
    index(safe, _class_name="StableDiffusionPipelineSafe", safety_checker=checker)
    return Layout(ours="safe")


# ---- places --------------------------------------------------------------------------------------------------------


def azure_model_folder(folder: Path) -> Layout:
    inner = folder.parent / "mounted" / "mlflow_model_folder"
    (inner / "artifacts").mkdir(parents=True)
    (inner / "artifacts" / "INPUT_model_path").symlink_to(folder)
    (inner / "MLmodel").write_text("flavors: {}\n")
    return Layout(ours="mounted")


def mlflow_folder(folder: Path) -> Layout:
    azure_model_folder(folder)
    return Layout(ours="mounted/mlflow_model_folder")


def mlflow_folder_with_other_names(folder: Path) -> Layout:
    inner = folder.parent / "run" / "artifacts"
    inner.mkdir(parents=True)
    (inner / "sd").symlink_to(folder)
    return Layout(ours="run")


def snapshot_of_links(folder: Path) -> Layout:
    snapshot = folder.parent / "models--org--name" / "snapshots" / ("a" * 40)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return Layout(ours=str(snapshot.relative_to(folder.parent)))


def name_with_blanks_and_umlauts(folder: Path) -> Layout:
    (folder.parent / "mein schönes Modell 東京").symlink_to(folder)
    return Layout(ours="mein schönes Modell 東京")


def declared_defaults(folder: Path) -> Layout:
    """Which diffusers knows nothing of: it is asked for the same by its arguments."""
    said = {"num_inference_steps": 4, "guidance_scale": 2.0, "height": 72, "width": 64}
    (folder / "mii_serve_defaults.json").write_text(json.dumps(said))
    return Layout(asked=said)


LAYOUTS: Mapping[str, Builder] = {
    builder.__name__.replace("_", " "): builder
    for builder in (
        as_saved,
        fp16_files_only,
        fp16_files_beside_the_others,
        stored_in_fp16,
        unet_in_fp16_and_the_rest_in_fp32,
        stored_in_bf16,
        unet_in_shards,
        every_part_in_shards,
        pickles,
        pickles_beside_safetensors,
        vae_with_old_names,
        text_encoder_with_old_names,
        tensors_that_nobody_needs,
        no_checker,
        no_checker_but_a_feature_extractor,
        no_word_of_a_checker,
        a_checker_that_fires,
        feature_extractor_of_old,
        v_prediction,
        scheduler_config_of_2022,
        ddim_of_2022,
        class_in_the_index_wins,
        modern_scheduler,
        model_index_of_2022,
        unet_config_of_2022,
        default_size_of_an_old_unet,
        vae_config_of_2022,
        another_scaling_factor,
        size_as_a_list,
        heads_as_a_list,
        keys_that_nobody_knows,
        one_text_layer_less,
        tokenizer_json_only,
        both_kinds_of_tokenizer_files,
        tokenizer_config_of_2022,
        fast_tokenizer_in_the_index,
        words_added_to_the_tokenizer,
        words_in_added_tokens_json,
        padded_with_another_token,
        words_that_the_text_encoder_does_not_know,
        index_of_image_to_image,
        latent_consistency_model,
        safe_stable_diffusion_with_a_pickled_checker,
        azure_model_folder,
        mlflow_folder,
        mlflow_folder_with_other_names,
        snapshot_of_links,
        name_with_blanks_and_umlauts,
        declared_defaults,
    )
}
