"""The batched engine with DeepSpeed's kernels: one loop with `native`, another kernel set under it.

What the machine must have is in `engine/requirements.py`; here it is taken for granted.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from mii_serve.engine.deepspeed.injection import inject, why_not_injectable
from mii_serve.engine.deepspeed.proof import NUM_ROWS, Proof
from mii_serve.engine.deepspeed.unet import DeepSpeedRowUNet
from mii_serve.engine.deepspeed.workspace import Workspace
from mii_serve.engine.native.engine import CUDA_SLOTS, NativeEngine
from mii_serve.engine.native.kernels import KernelSet
from mii_serve.engine.native.lattice import TurnSize
from mii_serve.errors import UnusableEngineError
from mii_serve.models import LoadedModel
from mii_serve.types import LATENT_SCALE

logger = logging.getLogger(__name__)


class DeepSpeedEngine(NativeEngine):
    """Implements `mii_serve.engine.Engine`. The model's UNet is changed in place and belongs to the engine from then on."""

    def __init__(self, model: LoadedModel, *, max_slots: int | None = None, lattice: Sequence[TurnSize] | None = None) -> None:
        """`model` is in float16 and has a UNet that `native.unet.why_unsupported` has nothing against.

        Raises:
            UnusableEngineError: DeepSpeed cannot do it, or its kernels do not compute what the UNet computes.
        """
        unet, defaults = model.pipeline.unet, model.defaults
        if (reason := why_not_injectable(unet)) is not None:
            raise UnusableEngineError(f"DeepSpeed's kernels cannot compute this UNet: {reason}")
        if unet.device.type == "cuda":
            torch.cuda.set_device(unet.device)  # the workspace is taken on the current device
        slots = max_slots or CUDA_SLOTS
        low, high = (side // LATENT_SCALE for side in (model.limits.min_size_px, model.limits.max_size_px))
        height, width = defaults.height // LATENT_SCALE, defaults.width // LATENT_SCALE
        odd = max(low, min(9, high))
        questions = ((height, width), (odd, odd))
        # All slots at the default size, or one guided sample at the largest; what is more is made in several calls.
        max_cells = max(
            2 * slots * height * width,
            2 * high * high,
            *(NUM_ROWS * rows * columns for rows, columns in questions),
            *(size.num_cells for size in lattice or ()),
        )
        with torch.inference_mode():
            unet.to(memory_format=torch.channels_last)
            proof = Proof.ask(unet, num_tokens=model.pipeline.tokenizer.model_max_length, sizes=questions)
            row_unet, self._workspace = _put_in(unet, proof, max_cells=max_cells, sides=range(low, high + 1))
        kernels = KernelSet(name="deepspeed", unet=row_unet, max_cells_per_call=max_cells)
        super().__init__(model, max_slots=slots, lattice=lattice, kernels=kernels)

    def close(self) -> None:
        super().close()
        self._workspace.release()


def _put_in(unet: Any, proof: Proof, *, max_cells: int, sides: range) -> tuple[DeepSpeedRowUNet, Workspace]:
    """Inject, and take the workspace, and keep both only if the proof holds."""
    try:
        num_blocks = inject(unet)
        with contextlib.ExitStack() as undo:
            workspace = Workspace(unet, max_cells=max_cells, sides=sides)
            undo.callback(workspace.release)
            row_unet = DeepSpeedRowUNet(unet)
            off = proof.check(row_unet)
            undo.pop_all()
    except UnusableEngineError:
        raise
    except Exception as error:  # of the inside of a package that may have moved, or of a kernel not made for this device
        raise UnusableEngineError(f"DeepSpeed fails here: {type(error).__name__}: {error}") from error
    logger.info("DeepSpeed computes %d transformer blocks, %.2g off the UNet's own modules", num_blocks, off)
    return row_unet, workspace
