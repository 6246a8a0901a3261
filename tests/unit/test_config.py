"""Where a setting comes from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mii_serve.config import DeployConfig, setting_names
from mii_serve.errors import ConfigError


def test_the_models_names_come_from_flags_a_variable_or_the_file(tmp_path, monkeypatch):
    assert DeployConfig.load({"served_model_name": ["org/sd", "", "dall-e-3", "org/sd"]}).served_model_name == (
        "org/sd",
        "dall-e-3",
    )
    for text in ("served_model_name: sd", "served_model_name: [sd]"):
        (tmp_path / "deploy.yaml").write_text(text)
        assert DeployConfig.load({}, tmp_path / "deploy.yaml").served_model_name == ("sd",)
    monkeypatch.setenv("MII_SERVE_SERVED_MODEL_NAME", "org/sd, dall-e-3")
    config = DeployConfig.load({})
    assert config.served_model_name == ("org/sd", "dall-e-3")
    assert DeployConfig.from_json(config.to_json()) == config
    monkeypatch.setenv("MII_SERVE_SERVED_MODEL_NAME", "")
    assert DeployConfig.load({}).served_model_name == ()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "deploy.yaml"
    path.write_text("grpc_port: 1\ndeployment_name: file\nlimits: {max_prompt_chars: 10}\n")
    return path


def test_flags_beat_environment_beats_file_beats_default(file, monkeypatch):
    monkeypatch.setenv("MII_SERVE_GRPC_PORT", "2")
    monkeypatch.setenv("MII_SERVE_DEPLOYMENT_NAME", "environment")
    config = DeployConfig.load({"grpc_port": 3}, file)
    assert (config.grpc_port, config.deployment_name, config.limits.max_prompt_chars) == (3, "environment", 10)
    assert (config.http_port, config.host, config.model) == (5001, "127.0.0.1", "demo")


def test_nested_settings_merge_key_by_key(file, monkeypatch):
    monkeypatch.setenv("MII_SERVE_LIMITS__MAX_IMAGES_PER_PROMPT", "2")
    limits = DeployConfig.load({}, file).limits
    assert (limits.max_prompt_chars, limits.max_images_per_prompt) == (10, 2)


def test_a_replica_reads_what_the_front_wrote_whatever_the_environment(file, monkeypatch):
    config = DeployConfig.load({"grpc_port": 3}, file)
    monkeypatch.setenv("MII_SERVE_GRPC_PORT", "9")
    monkeypatch.setenv("MII_SERVE_LIMITS__MAX_PROMPT_CHARS", "99")
    assert DeployConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        ({"grpc_prot": 1}, "grpc_prot"),
        ({"grpc_port": 65536}, "grpc_port"),
        ({"grpc_port": "many"}, "grpc_port"),
        ({"replicas": 0}, "replicas"),
        ({"engine": "fast"}, "engine"),
        ({"device": "tpu"}, "device"),
        ({"model": ""}, "model"),
        ({"served_model_name": ["ä"]}, "served_model_name.0"),
        ({"http": {"keep_alive_s": 0}}, "http.keep_alive_s"),
        ({"http": {"public_url": "pictures.example"}}, "http.public_url"),
        ({"limits": {"max_seps": 1}}, "limits.max_seps"),
        ({"limits": {"max_guidance_scale": float("nan")}}, "limits.max_guidance_scale"),
        ({"limits": {"max_size_px": 100}}, "limits.max_size_px"),
    ],
)
def test_a_bad_setting_is_refused_by_name(flags, setting):
    with pytest.raises(ConfigError) as caught:
        DeployConfig.load(flags)
    assert caught.value.setting == setting


def test_a_bad_environment_variable_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("MII_SERVE_HTTP_PORT", "no")
    with pytest.raises(ConfigError, match="http_port"):
        DeployConfig.load({})


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "{: bad"), ("a.toml", "= bad"), ("a.yaml", "- a list"), ("a.yaml", "colour: red")]
)
def test_a_bad_file_is_a_config_error(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError):
        DeployConfig.load({}, path)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        DeployConfig.load({}, tmp_path / "none.yaml")


def test_azures_variables_stand_between_the_environment_and_the_file(tmp_path, monkeypatch):
    file = tmp_path / "deploy.yaml"
    file.write_text("replicas: 5\nmax_slots: 7\n")
    for name, value in (("TENSOR_PARALLEL", "1"), ("NUM_REPLICAS", "2"), ("WORKER_COUNT", "4")):
        monkeypatch.setenv(name, value)
    config = DeployConfig.load({}, file)
    assert (config.tensor_parallel, config.replicas, config.max_slots) == (1, 2, 4)
    monkeypatch.setenv("MII_SERVE_REPLICAS", "3")
    assert DeployConfig.load({}, file).replicas == 3
    for bad in ("0", "two", "-1", "1.5", "²"):
        monkeypatch.setenv("NUM_REPLICAS", bad)
        with pytest.raises(ConfigError, match="NUM_REPLICAS: must be a whole number"):
            DeployConfig.load({})


def test_azures_variables_name_the_model_and_the_deployment(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYMENT_NAME", "blue")
    monkeypatch.setenv("AZUREML_MODEL_DIR", "/var/models/sd/4")
    config = DeployConfig.load({})
    assert (config.deployment_name, config.model) == ("blue", "/var/models/sd/4")
    assert DeployConfig.origins({})["model"] == "environment AZUREML_MODEL_DIR"
    monkeypatch.setenv("MLFLOW_MODEL_FOLDER", "mlflow_model_folder")
    assert DeployConfig.load({}).model == "/var/models/sd/4/mlflow_model_folder"
    assert DeployConfig.load({"model": "demo"}).model == "demo"


@pytest.mark.parametrize(
    ("flags", "nearest"),
    [({"grpc_prot": 1}, "grpc_port"), ({"limits": {"max_size": 1}}, "limits.max_size_px"), ({"colour": 1}, None)],
)
def test_a_misspelt_setting_is_told_its_nearest_name(flags, nearest):
    with pytest.raises(ConfigError, match="no such setting") as caught:
        DeployConfig.load(flags)
    assert str(caught.value).endswith(f"did you mean {nearest}?" if nearest else "no such setting")


def test_a_misspelt_variable_is_refused_and_a_foreign_one_is_not(monkeypatch):
    for name in ("MII_SERVE_SERVICE_HOST", "MII_SERVE_PORT", "MII_SERVE_PORT_50050_TCP_ADDR", "MII_SERVE_API_KEY"):
        monkeypatch.setenv(name, "x")
    DeployConfig.load({})
    monkeypatch.setenv("MII_SERVE_REPLCAS", "3")
    with pytest.raises(ConfigError, match="MII_SERVE_REPLCAS: no such setting; did you mean MII_SERVE_REPLICAS"):
        DeployConfig.load({})


def test_each_setting_has_an_origin(file, monkeypatch):
    monkeypatch.setenv("MII_SERVE_HTTP_PORT", "2")
    monkeypatch.setenv("NUM_REPLICAS", "2")
    monkeypatch.setenv("MII_SERVE_LIMITS__MAX_SIZE_PX", "128")
    origins = DeployConfig.origins({"host": "::1"}, file)
    assert origins["host"] == "flag"
    assert origins["http_port"] == "environment MII_SERVE_HTTP_PORT"
    assert origins["replicas"] == "environment NUM_REPLICAS"
    assert origins["limits.max_size_px"] == "environment MII_SERVE_LIMITS__MAX_SIZE_PX"
    assert origins["grpc_port"] == origins["limits.max_prompt_chars"] == f"file {file}"
    assert origins["model"] == "default"
    assert set(origins) == set(setting_names(DeployConfig))


@pytest.mark.parametrize(
    ("settings", "setting", "remedy"),
    [
        ({"engine": "reference", "tensor_parallel": 2}, "tensor_parallel", "use 1"),
        ({"device": "cuda:1", "tensor_parallel": 2}, "device", "use 'cuda'"),
        ({"engine": "deepspeed", "tensor_parallel": 2, "parallelism": "tensor"}, "parallelism", "use 'rows'"),
        ({"parallelism": "columns"}, "parallelism", "'rows' or 'tensor'"),
        ({"tensor_parallel": 0}, "tensor_parallel", "greater than or equal to 1"),
    ],
)
def test_ranks_that_cannot_work_are_refused_with_what_would(settings, setting, remedy):
    with pytest.raises(ConfigError, match=remedy) as caught:
        DeployConfig.load(settings)
    assert caught.value.setting == setting


def test_embeddings_are_paths_by_token_from_every_source(tmp_path, monkeypatch):
    expected = {"<cat>": Path("cat.safetensors"), "my_style": Path("a=b/style.pt")}
    pairs = [f"{token}={path}" for token, path in expected.items()]
    (tmp_path / "deploy.yaml").write_text("embedding: {<cat>: cat.safetensors, my_style: a=b/style.pt}\n")
    config = DeployConfig.load({}, tmp_path / "deploy.yaml")
    assert config.embedding == expected == DeployConfig.load({"embedding": pairs}).embedding
    assert DeployConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match=r"embedding: .*must be NAME=PATH"):
        DeployConfig.load({"embedding": ["<cat>"]})
    with pytest.raises(ConfigError, match="embedding"):
        DeployConfig.load({"embedding": ["two words=x.pt"]})
    monkeypatch.setenv("MII_SERVE_EMBEDDING", ",".join(pairs))
    assert DeployConfig.load({}).embedding == expected
