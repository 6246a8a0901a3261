"""What a server says of itself: the model, what it accepts, and how busy it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

from mii_serve.types.capabilities import Capabilities
from mii_serve.types.limits import GenerationDefaults, Limits, ModelParts
from mii_serve.types.loras import LoraInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Counts since the replica started.

    `num_running` are samples in a slot, `num_waiting` samples without one; `num_steps` are UNet calls, one per sample,
    `num_turns` those of the whole batch. `max_cells_per_call` is the largest UNet call (rows × latent pixels) there is memory
    for; None while it was never too small.
    """

    uptime_s: float
    max_slots: int
    num_running: int
    num_waiting: int
    num_steps: int
    num_images: int
    num_requests: int
    num_cancelled_requests: int
    num_turns: int
    num_graph_misses: int
    max_cells_per_call: int | None

    @classmethod
    def sum(cls, activities: Iterable[Activity]) -> Activity:
        """Of several replicas: counts add up; the oldest replica's age and the tightest bound of memory stand for all."""
        parts = list(activities)
        counts = {name: sum(getattr(part, name) for part in parts) for name in _COUNTS}
        bounds = [part.max_cells_per_call for part in parts if part.max_cells_per_call is not None]
        return cls(**counts, uptime_s=max(part.uptime_s for part in parts), max_cells_per_call=min(bounds) if bounds else None)


_COUNTS = [one.name for one in fields(Activity) if one.name not in ("uptime_s", "max_cells_per_call")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    """One copy of the model; no activity while it is not ready. `devices` are as in `EngineDescription`."""

    index: int
    is_ready: bool
    num_restarts: int
    activity: Activity | None
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What runs behind a target, what it accepts and how busy it is.

    `schedulers` maps every accepted name to the name the server answers with. `activity` is that of all replicas together.
    `engine_note` says why this engine runs and not the preferred one, where that could not. `default_scheduler_class` and its
    options are what a request that names no scheduler gets, as in `EffectiveParameters`. `num_ranks` and `parallelism` are as
    in `EngineDescription`, and `engine_kernels` is its `kernels`. `needs_mask` is as in `Capabilities`. `loras` are those that
    requests can name.
    """

    version: str
    deployment_name: str
    model: str
    model_revision: str
    engine: str
    dtype: str
    device: str
    has_safety_checker: bool
    defaults: GenerationDefaults
    limits: Limits
    schedulers: Mapping[str, str]
    activity: Activity
    replicas: tuple[ReplicaInfo, ...] = ()
    engine_note: str = ""
    default_scheduler_class: str = ""
    default_scheduler_options: Mapping[str, str] = field(default_factory=dict)
    is_default_scheduler_compiled: bool = True
    num_ranks: int = 1
    parallelism: str = ""
    engine_kernels: str = ""
    needs_mask: bool = False
    loras: tuple[LoraInfo, ...] = ()
    parts: ModelParts = field(default_factory=ModelParts)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            limits=self.limits,
            defaults=self.defaults,
            schedulers=self.schedulers,
            needs_mask=self.needs_mask,
            parts=self.parts,
            loras={lora.name: lora for lora in self.loras},
        )

    def with_replicas(self, replicas: Iterable[ReplicaInfo]) -> ServerInfo:
        """The same server as the sum of these replicas, of which one at least is ready."""
        all_replicas = tuple(replicas)
        activities = [replica.activity for replica in all_replicas if replica.activity is not None]
        return replace(self, replicas=all_replicas, activity=Activity.sum(activities))
