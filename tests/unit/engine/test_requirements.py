"""Which engine a machine can run, and what it must install to, for machines we do not have."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import COMPLETE, MISSING, with_extensions

from mii_serve.engine.engine_times import COMPUTED_TO_BE_FASTER, EngineTimes
from mii_serve.engine.requirements import first_missing, preferred, requirements
from mii_serve.types import ENGINES


def times(deepspeed_ms: float) -> EngineTimes:
    return EngineTimes(device="a", native_ms=(2.0, 9.0), deepspeed_ms=(deepspeed_ms, 9.0))


def test_on_a_complete_machine_nothing_is_missing_and_auto_takes_what_was_measured_to_be_faster():
    for engine in ENGINES:
        assert first_missing(engine, COMPLETE) is None
        assert all(one.is_met and not one.remedy for one in requirements(engine, COMPLETE))
    assert preferred(COMPLETE, times(1.9)) == "deepspeed"
    assert preferred(COMPLETE, times(2.1)) == preferred(COMPLETE, times(2.0)) == "native"
    assert preferred(COMPLETE, None) == COMPUTED_TO_BE_FASTER


@pytest.mark.parametrize(("machine", "what", "found", "remedy"), MISSING.values(), ids=list(MISSING))
def test_what_is_missing_is_named_with_its_remedy_and_leaves_native_alone(machine, what, found, remedy):
    missing = first_missing("deepspeed", machine)
    assert missing is not None
    assert what in missing.what and missing.found == found and remedy in missing.remedy
    others = [one.what for one in requirements("deepspeed", machine) if not one.is_met and one != missing]
    if machine.torch_cuda is not None:
        assert others == [], "and nothing else is wrong"
    else:
        assert others == ["DeepSpeed's extensions, built for this torch and its CUDA"], "which has none"
    assert first_missing("native", machine) is None and preferred(machine, times(1.0)) == "native"


def test_without_nvcc_the_extensions_are_built_elsewhere():
    missing = first_missing("deepspeed", replace(with_extensions(names=frozenset()), nvcc=None))
    assert missing is not None and missing.remedy.endswith("on any machine with nvcc")


def test_a_torch_that_cannot_be_imported_is_everybodys_lack():
    broken = replace(COMPLETE, torch_error="OSError: libcudart.so.13: cannot open shared object file", torch_cuda=None, gpus=())
    for engine in ENGINES:
        missing = first_missing(engine, broken)
        assert missing is not None and "libcudart" in missing.found and missing.remedy.startswith("pip install torch")


def test_what_the_client_alone_lacks_comes_with_the_extra_server():
    client = replace(
        COMPLETE, packages={}, torch_error="ModuleNotFoundError: No module named 'torch'", torch_cuda=None, gpus=()
    )
    for one in requirements("native", client):
        assert (one.found, one.remedy) == ("not installed", "install mii_serve with the extra server: see README, Install")
