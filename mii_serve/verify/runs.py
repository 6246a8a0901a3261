"""A verification from the settings of a deployment: for the command, and for a replica that is to start only if it passes."""

from __future__ import annotations

import logging

from mii_serve.config import DeployConfig
from mii_serve.engine import Engine
from mii_serve.engine.factory import build_engine, precision_of
from mii_serve.errors import ConfigError, VerificationError
from mii_serve.models import RANDOM_SD_V1_4, Precision
from mii_serve.verify.check import verify
from mii_serve.verify.report import Report
from mii_serve.verify.truth import free_memory, learn_truth

logger = logging.getLogger(__name__)


def verify_once(config: DeployConfig) -> Report:
    """Load the reference, then the engine, and free both again.

    Raises:
        ConfigError, ModelError: as `mii_serve deploy` would.
        EngineError: the reference failed, or the engine did before it could be checked.
    """
    engine, report = _verified(config)
    engine.close()
    del engine
    free_memory()
    return report


def build_verified_engine(config: DeployConfig) -> Engine:
    """A warm engine that has passed.

    Raises:
        VerificationError: it has not; the message names the stage that fails first.
        ConfigError, ModelError, EngineError: as `verify_once`.
    """
    engine, report = _verified(config)
    if not report.is_passed:
        engine.close()
        raise VerificationError(report.verdict)
    logger.info("verified: %s", report.verdict)
    return engine


def _verified(config: DeployConfig) -> tuple[Engine, Report]:
    refuse_other_weights(config.model, precision_of(config))
    truth = learn_truth(config)
    engine = build_engine(config)
    engine.warmup()
    return engine, verify(engine, truth)


def refuse_other_weights(model: str, dtype: Precision) -> None:
    """Random weights are drawn in the engine's precision: in another than the reference's they are other weights.

    Raises:
        ConfigError
    """
    if model == RANDOM_SD_V1_4 and dtype != "fp32":
        raise ConfigError("dtype", f"{RANDOM_SD_V1_4} has other weights in {dtype}; only fp32 can be verified")
