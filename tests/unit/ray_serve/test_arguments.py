"""The arguments of the application on Ray Serve, and how many replicas there are to be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mii_serve.errors import ConfigError
from mii_serve.ray_serve.arguments import read_arguments
from mii_serve.ray_serve.scaling import METRIC, QueuedWork, num_replicas


def test_settings_and_what_ray_has_to_know_stand_side_by_side():
    scale, settings, config = read_arguments({"model": "demo", "replicas": "2", "max_replicas": "3", "num_gpus": "0.5"})
    assert (scale.max_replicas, scale.num_gpus, scale.num_cpus) == (3, 0.5, 1.0)
    assert settings == {"model": "demo", "replicas": "2"} and config.replicas == 2


def test_a_setting_of_a_group_has_a_dot_or_a_group():
    _, settings, config = read_arguments({"limits": {"max_images_per_prompt": 3}, "limits.max_size_px": "512"})
    assert settings == {"limits": {"max_images_per_prompt": 3, "max_size_px": "512"}}
    assert (config.limits.max_images_per_prompt, config.limits.max_size_px) == (3, 512)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"replica": 2}, "replica: no such setting; did you mean replicas?"),
        ({"max_replicas": 0}, "max_replicas: Input should be greater than or equal to 1, got 0"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas: must be at least replicas, 3, got 2"),
        ({"content_safety": {"key": "hush"}}, "content_safety.key: is a secret"),
        ({"content_safety.key": "hush"}, "content_safety.key: is a secret"),
        ({"jobs_folder": "/jobs"}, "jobs_folder: is not for Ray"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_named(arguments, said):
    with pytest.raises(ConfigError) as caught:
        read_arguments(arguments)
    assert said in str(caught.value) and "hush" not in str(caught.value)


@pytest.mark.parametrize(("queued_s", "expected"), [([], 1), ([0.0], 1), ([9.9], 1), ([10.1], 2), ([30.0, 0.0, 5.0], 4)])
def test_there_are_as_many_replicas_as_bring_the_work_of_each_to_the_target(queued_s, expected):
    assert num_replicas(queued_s, 10.0) == expected


def test_the_policy_reads_what_each_replica_reports():
    policy = QueuedWork(target_s=2.0)
    assert policy(SimpleNamespace(aggregated_metrics={METRIC: {"a": 3.0, "b": 2.0}})) == (3, {})
    assert policy(SimpleNamespace(aggregated_metrics=None)) == (1, {})
