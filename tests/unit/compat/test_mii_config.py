"""MII's words in, our settings out; what is not for this server is named."""

from __future__ import annotations

import logging

import pytest

from mii_serve.compat import mii_config
from mii_serve.compat.mii_config import Ignored, MiiSettings, Refused, Taken, fates, read_mii_file, translate
from mii_serve.config import DeployConfig
from mii_serve.errors import ConfigError

LEAST = {"deployment_name": "sd", "model": "demo", "task": "text-to-image"}


@pytest.fixture(autouse=True)
def _our_rules_alone(monkeypatch):
    """Whether or not deepspeed-mii is installed here; that its own rules agree is tested where it is."""
    monkeypatch.setattr(mii_config, "_ask_mii", lambda flat: None)


def settings(**given) -> dict:
    return translate({**LEAST, **given}).settings


def test_the_least_there_can_be():
    assert settings() == {
        "model": "demo",
        "deployment_name": "sd",
        "grpc_port": 50050,
        "http_port": 0,
        "dtype": "auto",
        "engine": "auto",
        "replicas": 1,
        "tensor_parallel": 1,
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"port_number": 50060}, {"grpc_port": 50060}),
        ({"enable_restful_api": True}, {"http_port": 51080}),
        ({"enable_restful_api": True, "restful_api_port": 8080}, {"http_port": 8080}),
        ({"restful_api_port": 8080}, {"http_port": 0}),
        ({"replica_num": 4, "tensor_parallel": 2}, {"replicas": 4, "tensor_parallel": 2}),
        ({"dtype": "half"}, {"dtype": "fp16"}),
        ({"dtype": "torch.float32"}, {"dtype": "fp32"}),
        ({"dtype": "bfloat16"}, {"dtype": "bf16"}),
        ({"enable_deepspeed": False}, {"dtype": "fp32", "engine": "native"}),
        ({"enable_deepspeed": False, "dtype": "fp16"}, {"dtype": "fp16", "engine": "native"}),
        ({"replace_with_kernel_inject": False}, {"engine": "native", "dtype": "auto"}),
        ({"deploy_rank": [0]}, {}),
        ({"tensor_parallel": 2, "deploy_rank": [0, 1]}, {"tensor_parallel": 2}),
    ],
)
def test_what_is_taken(given, expected):
    assert settings(**given).items() >= expected.items()


def test_every_translation_is_a_configuration():
    config = DeployConfig.load({}, written=settings(dtype="fp16", replica_num=2, enable_restful_api=True))
    assert (config.dtype, config.replicas, config.http_port, config.deployment_name) == ("fp16", 2, 51080, "sd")


def test_groups_and_the_other_name_of_the_model_are_understood():
    nested = {
        "deployment_name": "a",
        "mii_config": {"port_number": 1},
        "model_conf": {"model_name_or_path": "x", "task": LEAST["task"]},
    }
    assert translate(nested).settings.items() >= {"deployment_name": "a", "grpc_port": 1, "model": "x"}.items()


def test_enumerations_and_dtypes_are_their_names():
    class Named:
        value = "text-to-image"

    class Dtype:
        def __str__(self) -> str:
            return "torch.float16"

    assert settings(task=Named(), dtype=Dtype())["dtype"] == "fp16"


def test_a_model_path_is_the_model_or_the_hubs_cache(tmp_path):
    translated = translate({**LEAST, "model_path": str(tmp_path)})
    assert (translated.settings["model"], translated.environment) == ("demo", {"HF_HUB_CACHE": str(tmp_path)})
    (tmp_path / "model_index.json").touch()
    translated = translate({**LEAST, "model_path": str(tmp_path)})
    assert (translated.settings["model"], translated.environment) == (str(tmp_path), {})


def test_a_token_goes_into_the_environment_and_is_never_shown():
    translated = translate({**LEAST, "hf_auth_token": "hf_secret"})
    assert translated.environment == {"HF_TOKEN": "hf_secret"}
    assert "hf_secret" not in repr(translated) + str(translated.settings)
    assert "hf_secret" not in repr(MiiSettings(**LEAST, hf_auth_token="hf_secret"))
    for bad in ({"hf_auth_token": ["hf_secret"]}, {"pipeline_kwargs": {"token": "hf_secret"}}, {"ds_config": "hf_secret"}):
        with pytest.raises(ConfigError) as caught:
            translate({**LEAST, **bad})
        assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({"dtyp": "fp16"}, "dtyp"),
        ({"dtype": "int4"}, "dtype"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": 16}, "dtype"),
        ({"task": "text-generation"}, "task"),
        ({"replica_num": 0}, "replica_num"),
        ({"tensor_parallel": "two"}, "tensor_parallel"),
        ({"port_number": 70000}, "port_number"),
        ({"deployment_name": ""}, "deployment_name"),
        ({"deploy_rank": [0, 1]}, "deploy_rank"),
        ({"deploy_rank": 3}, "deploy_rank"),
        ({"model_conf": {"model": "other"}}, "model"),
        ({"mii_config": 5}, "mii_config"),
        ({"deployment_type": "aml"}, "deployment_type"),
        ({"deployment_type": "cloud"}, "deployment_type"),
    ],
)
def test_what_is_wrong_is_named(given, setting):
    with pytest.raises(ConfigError) as caught:
        translate({**LEAST, **given})
    assert caught.value.setting == setting


@pytest.mark.parametrize("name", LEAST)
def test_what_is_missing_is_named(name):
    with pytest.raises(ConfigError, match=f"{name}: is missing"):
        translate({key: value for key, value in LEAST.items() if key != name})


def test_every_refused_setting_is_refused_by_name_and_with_a_reason():
    given = {
        "deployment_type": "non-persistent",
        "hostfile": "/etc/hosts",
        "load_with_sys_mem": True,
        "deploy_rank": [1],
        "replica_configs": [{}],
        "trust_remote_code": True,
        "pipeline_kwargs": {"a": 1},
        "enable_zero": True,
        "ds_config": {"a": 1},
        "checkpoint_dict": {"a": 1},
    }
    refused = {name: fate.why for name, fate in fates().items() if isinstance(fate, Refused)}
    assert given.keys() == refused.keys()
    for name, value in given.items():
        with pytest.raises(ConfigError) as caught:
            translate({**LEAST, name: value})
        assert str(caught.value) == f"{name}: is not for this server: {refused[name]}"


def test_what_is_ignored_says_why_unless_it_is_the_default(caplog):
    ignored = {name: fate.why for name, fate in fates().items() if isinstance(fate, Ignored)}
    defaults = {name: MiiSettings.model_fields[name].default for name in ignored}
    with caplog.at_level(logging.INFO):
        plain = settings(**defaults)
    assert not caplog.records
    changed = {name: {bool: True, int: 7, str: "other"}[type(value)] for name, value in defaults.items()}
    with caplog.at_level(logging.INFO):
        assert settings(**changed) == plain
    assert [record.getMessage() for record in caplog.records] == [
        f"MII's setting {name} is ignored: {why}" for name, why in ignored.items()
    ]


def test_every_setting_has_one_fate():
    assert fates().keys() == MiiSettings.model_fields.keys()
    assert all(isinstance(fate, Taken | Ignored | Refused) for fate in fates().values())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a\n", "must hold MII's settings by name"),
        ("1: a\n", "must hold MII's settings by name"),
        ("hf_auth_token: [hf_secret\n", "is not YAML at line"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("", "must hold MII's settings by name"),
    ],
)
def test_a_file_that_cannot_be_read_says_so_and_quotes_nothing(tmp_path, text, problem):
    file = tmp_path / "mii.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        read_mii_file(file)
    assert "hf_secret" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*missing"):
        read_mii_file(tmp_path / "missing")
