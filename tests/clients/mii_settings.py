"""Compares our rules for MII's settings with deepspeed-mii's own classes, and tells as the last line of its output.

usage: mii_settings.py FOLDER; FOLDER holds our package.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys

from mii.legacy.config import MIIConfig, ModelConfig
from pydantic import ValidationError

LEAST = {"deployment_name": "sd", "model": "demo", "task": "text-to-image", "skip_model_check": True}
CASES = [
    {},
    {"dtype": "fp16"},
    {"dtype": "half"},
    {"dtype": "bfloat"},
    {"dtype": "float64"},
    {"dtype": 16},
    {"dtyp": "fp16"},
    {"replica_num": "2"},
    {"replica_num": "two"},
    {"replica_num": 1.5},
    {"tensor_parallel": 2},
    {"tensor_parallel": 2, "deploy_rank": [0, 1]},
    {"tensor_parallel": 2, "deploy_rank": [0]},
    {"deploy_rank": "zero"},
    {"enable_cuda_graph": "yes"},
    {"enable_cuda_graph": "perhaps"},
    {"port_number": None},
    {"deployment_type": "local"},
    {"deployment_type": "cloud"},
    {"task": "text-to-video"},
    {"max_tokens": "many"},
    {"hf_auth_token": 5},
    {"ds_config": []},
    {"checkpoint_dict": 5},
    {"replica_configs": 5},
    {"model": None},
]


def is_accepted(build, **given) -> bool:
    try:
        build(**given)
    except (ValidationError, TypeError):
        return False
    return True


def theirs(**given):
    outer = {name: value for name, value in given.items() if name in MIIConfig.model_fields}
    return MIIConfig(**outer, model_conf={name: value for name, value in given.items() if name not in outer})


def plain(value: object) -> str:
    return str(getattr(value, "value", value))


def checked(main, **given) -> dict | None:
    """What the process that asks MII's classes would say."""
    sys.stdin = io.StringIO(json.dumps({**LEAST, **given}))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main()
    return json.loads(out.getvalue().splitlines()[-1])


def main(folder: str) -> None:
    sys.path.append(folder)
    from mii_serve.compat import mii_check
    from mii_serve.compat.mii_config import MiiSettings, translate

    known = {**MIIConfig.model_fields, **ModelConfig.model_fields}
    del known["model_conf"]
    ours = MiiSettings.model_fields
    log = io.StringIO()
    logging.basicConfig(level=logging.INFO, stream=log, force=True)
    translate({**LEAST, "model_path": "models", "skip_model_check": False})
    verdicts = {
        json.dumps(case): [is_accepted(build, **{**LEAST, **case}) for build in (MiiSettings, theirs)] for case in CASES
    }
    told = {
        "names": [sorted(ours), sorted(known)],
        "defaults": {
            name: [plain(ours[name].default), plain(known[name].default)] for name in ours if not known[name].is_required()
        },
        "verdicts": verdicts,
        "log": log.getvalue(),
        "checked": [checked(mii_check.main, **given) for given in ({}, {"dtype": "int4"}, {"model": 5})],
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
