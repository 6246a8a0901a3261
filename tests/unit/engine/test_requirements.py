"""Which engine a machine can run, and what mends it, for machines we do not have."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import COMPLETE, LACKS, with_extensions

from mii_serve.engine.requirements import ENGINES, first_lack, preferred, requirements


def test_a_complete_machine_lacks_nothing_and_auto_takes_what_was_installed_on_purpose():
    for engine in ENGINES:
        assert first_lack(engine, COMPLETE) is None
        assert all(one.is_met and not one.remedy for one in requirements(engine, COMPLETE))
    assert preferred(COMPLETE) == "deepspeed"


@pytest.mark.parametrize(("machine", "what", "found", "remedy"), LACKS.values(), ids=list(LACKS))
def test_each_lack_is_named_with_its_remedy_and_leaves_native_alone(machine, what, found, remedy):
    lack = first_lack("deepspeed", machine)
    assert lack is not None
    assert what in lack.what and lack.found == found and remedy in lack.remedy
    others = [one.what for one in requirements("deepspeed", machine) if not one.is_met and one != lack]
    if machine.torch_cuda is not None:
        assert others == [], "and nothing else is wrong"
    else:
        assert others == ["DeepSpeed's extensions, built for this torch and its CUDA"], "which has none"
    assert first_lack("native", machine) is None and preferred(machine) == "native"


def test_without_nvcc_the_extensions_are_built_elsewhere():
    lack = first_lack("deepspeed", replace(with_extensions(names=frozenset()), nvcc=None))
    assert lack is not None and lack.remedy.endswith("on any machine with nvcc")


def test_a_torch_that_cannot_be_imported_is_everybodys_lack():
    broken = replace(COMPLETE, torch_error="OSError: libcudart.so.13: cannot open shared object file", torch_cuda=None, gpus=())
    for engine in ENGINES:
        lack = first_lack(engine, broken)
        assert lack is not None and "libcudart" in lack.found and lack.remedy.startswith("pip install torch")
