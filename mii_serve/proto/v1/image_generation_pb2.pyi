from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImageFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FORMAT_UNSPECIFIED: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PNG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_JPEG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_WEBP: _ClassVar[ImageFormat]
    IMAGE_FORMAT_RAW_RGB: _ClassVar[ImageFormat]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
    PRIORITY_BATCH: _ClassVar[Priority]
IMAGE_FORMAT_UNSPECIFIED: ImageFormat
IMAGE_FORMAT_PNG: ImageFormat
IMAGE_FORMAT_JPEG: ImageFormat
IMAGE_FORMAT_WEBP: ImageFormat
IMAGE_FORMAT_RAW_RGB: ImageFormat
PRIORITY_UNSPECIFIED: Priority
PRIORITY_HIGH: Priority
PRIORITY_NORMAL: Priority
PRIORITY_LOW: Priority
PRIORITY_BATCH: Priority

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "num_images_per_prompt", "scheduler", "seed", "output", "priority", "guidance_rescale", "image", "strength", "mask_image", "loras", "clip_skip", "eta", "timesteps", "sigmas", "prompt_embeds", "negative_prompt_embeds", "prompt_syntax")
    class LorasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGES_PER_PROMPT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_RESCALE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    MASK_IMAGE_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    CLIP_SKIP_FIELD_NUMBER: _ClassVar[int]
    ETA_FIELD_NUMBER: _ClassVar[int]
    TIMESTEPS_FIELD_NUMBER: _ClassVar[int]
    SIGMAS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_EMBEDS_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_EMBEDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SYNTAX_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    num_images_per_prompt: int
    scheduler: str
    seed: int
    output: OutputOptions
    priority: Priority
    guidance_rescale: float
    image: bytes
    strength: float
    mask_image: bytes
    loras: _containers.ScalarMap[str, float]
    clip_skip: int
    eta: float
    timesteps: _containers.RepeatedScalarFieldContainer[int]
    sigmas: _containers.RepeatedScalarFieldContainer[float]
    prompt_embeds: PromptEmbeds
    negative_prompt_embeds: PromptEmbeds
    prompt_syntax: str
    def __init__(self, prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., num_inference_steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., num_images_per_prompt: _Optional[int] = ..., scheduler: _Optional[str] = ..., seed: _Optional[int] = ..., output: _Optional[_Union[OutputOptions, _Mapping]] = ..., priority: _Optional[_Union[Priority, str]] = ..., guidance_rescale: _Optional[float] = ..., image: _Optional[bytes] = ..., strength: _Optional[float] = ..., mask_image: _Optional[bytes] = ..., loras: _Optional[_Mapping[str, float]] = ..., clip_skip: _Optional[int] = ..., eta: _Optional[float] = ..., timesteps: _Optional[_Iterable[int]] = ..., sigmas: _Optional[_Iterable[float]] = ..., prompt_embeds: _Optional[_Union[PromptEmbeds, _Mapping]] = ..., negative_prompt_embeds: _Optional[_Union[PromptEmbeds, _Mapping]] = ..., prompt_syntax: _Optional[str] = ...) -> None: ...

class OutputOptions(_message.Message):
    __slots__ = ("format", "quality", "embed_metadata", "preview_every")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    EMBED_METADATA_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    format: ImageFormat
    quality: int
    embed_metadata: bool
    preview_every: int
    def __init__(self, format: _Optional[_Union[ImageFormat, str]] = ..., quality: _Optional[int] = ..., embed_metadata: _Optional[bool] = ..., preview_every: _Optional[int] = ...) -> None: ...

class GeneratedImage(_message.Message):
    __slots__ = ("index", "data", "format", "height", "width", "seed", "nsfw_content_detected", "moderation_blocked")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NSFW_CONTENT_DETECTED_FIELD_NUMBER: _ClassVar[int]
    MODERATION_BLOCKED_FIELD_NUMBER: _ClassVar[int]
    index: int
    data: bytes
    format: ImageFormat
    height: int
    width: int
    seed: int
    nsfw_content_detected: bool
    moderation_blocked: bool
    def __init__(self, index: _Optional[int] = ..., data: _Optional[bytes] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., seed: _Optional[int] = ..., nsfw_content_detected: _Optional[bool] = ..., moderation_blocked: _Optional[bool] = ...) -> None: ...

class PromptEmbeds(_message.Message):
    __slots__ = ("num_tokens", "width", "dtype", "data")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    width: int
    dtype: str
    data: bytes
    def __init__(self, num_tokens: _Optional[int] = ..., width: _Optional[int] = ..., dtype: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class EffectiveParameters(_message.Message):
    __slots__ = ("prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "num_images_per_prompt", "scheduler", "seed", "engine", "dtype", "device", "model", "model_revision", "dropped_prompt", "dropped_negative_prompt", "scheduler_class", "scheduler_options", "is_scheduler_compiled", "guidance_rescale", "strength", "has_mask", "loras", "clip_skip", "eta", "timesteps", "sigmas", "prompt_syntax", "has_prompt_embeds")
    class SchedulerOptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class LorasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGES_PER_PROMPT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    DROPPED_PROMPT_FIELD_NUMBER: _ClassVar[int]
    DROPPED_NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_CLASS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    IS_SCHEDULER_COMPILED_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_RESCALE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    HAS_MASK_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    CLIP_SKIP_FIELD_NUMBER: _ClassVar[int]
    ETA_FIELD_NUMBER: _ClassVar[int]
    TIMESTEPS_FIELD_NUMBER: _ClassVar[int]
    SIGMAS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SYNTAX_FIELD_NUMBER: _ClassVar[int]
    HAS_PROMPT_EMBEDS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    num_images_per_prompt: int
    scheduler: str
    seed: int
    engine: str
    dtype: str
    device: str
    model: str
    model_revision: str
    dropped_prompt: str
    dropped_negative_prompt: str
    scheduler_class: str
    scheduler_options: _containers.ScalarMap[str, str]
    is_scheduler_compiled: bool
    guidance_rescale: float
    strength: float
    has_mask: bool
    loras: _containers.ScalarMap[str, float]
    clip_skip: int
    eta: float
    timesteps: _containers.RepeatedScalarFieldContainer[int]
    sigmas: _containers.RepeatedScalarFieldContainer[float]
    prompt_syntax: str
    has_prompt_embeds: bool
    def __init__(self, prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., num_inference_steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., num_images_per_prompt: _Optional[int] = ..., scheduler: _Optional[str] = ..., seed: _Optional[int] = ..., engine: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., model: _Optional[str] = ..., model_revision: _Optional[str] = ..., dropped_prompt: _Optional[str] = ..., dropped_negative_prompt: _Optional[str] = ..., scheduler_class: _Optional[str] = ..., scheduler_options: _Optional[_Mapping[str, str]] = ..., is_scheduler_compiled: _Optional[bool] = ..., guidance_rescale: _Optional[float] = ..., strength: _Optional[float] = ..., has_mask: _Optional[bool] = ..., loras: _Optional[_Mapping[str, float]] = ..., clip_skip: _Optional[int] = ..., eta: _Optional[float] = ..., timesteps: _Optional[_Iterable[int]] = ..., sigmas: _Optional[_Iterable[float]] = ..., prompt_syntax: _Optional[str] = ..., has_prompt_embeds: _Optional[bool] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "images", "parameters", "timings")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    images: _containers.RepeatedCompositeFieldContainer[GeneratedImage]
    parameters: EffectiveParameters
    timings: Timings
    def __init__(self, request_id: _Optional[str] = ..., images: _Optional[_Iterable[_Union[GeneratedImage, _Mapping]]] = ..., parameters: _Optional[_Union[EffectiveParameters, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queued_s", "total_s")
    QUEUED_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    queued_s: float
    total_s: float
    def __init__(self, queued_s: _Optional[float] = ..., total_s: _Optional[float] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("request_id", "queued", "started", "step", "image", "done", "preview", "restarted")
    class Queued(_message.Message):
        __slots__ = ("num_samples_ahead", "estimated_wait_s")
        NUM_SAMPLES_AHEAD_FIELD_NUMBER: _ClassVar[int]
        ESTIMATED_WAIT_S_FIELD_NUMBER: _ClassVar[int]
        num_samples_ahead: int
        estimated_wait_s: float
        def __init__(self, num_samples_ahead: _Optional[int] = ..., estimated_wait_s: _Optional[float] = ...) -> None: ...
    class Started(_message.Message):
        __slots__ = ("image_index",)
        IMAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
        image_index: int
        def __init__(self, image_index: _Optional[int] = ...) -> None: ...
    class Step(_message.Message):
        __slots__ = ("image_index", "step", "num_steps", "estimated_left_s")
        IMAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
        STEP_FIELD_NUMBER: _ClassVar[int]
        NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
        ESTIMATED_LEFT_S_FIELD_NUMBER: _ClassVar[int]
        image_index: int
        step: int
        num_steps: int
        estimated_left_s: float
        def __init__(self, image_index: _Optional[int] = ..., step: _Optional[int] = ..., num_steps: _Optional[int] = ..., estimated_left_s: _Optional[float] = ...) -> None: ...
    class Preview(_message.Message):
        __slots__ = ("image_index", "step", "data", "format", "height", "width", "nsfw_content_detected")
        IMAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
        STEP_FIELD_NUMBER: _ClassVar[int]
        DATA_FIELD_NUMBER: _ClassVar[int]
        FORMAT_FIELD_NUMBER: _ClassVar[int]
        HEIGHT_FIELD_NUMBER: _ClassVar[int]
        WIDTH_FIELD_NUMBER: _ClassVar[int]
        NSFW_CONTENT_DETECTED_FIELD_NUMBER: _ClassVar[int]
        image_index: int
        step: int
        data: bytes
        format: ImageFormat
        height: int
        width: int
        nsfw_content_detected: bool
        def __init__(self, image_index: _Optional[int] = ..., step: _Optional[int] = ..., data: _Optional[bytes] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., nsfw_content_detected: _Optional[bool] = ...) -> None: ...
    class Restarted(_message.Message):
        __slots__ = ("image_indexes",)
        IMAGE_INDEXES_FIELD_NUMBER: _ClassVar[int]
        image_indexes: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, image_indexes: _Optional[_Iterable[int]] = ...) -> None: ...
    class Done(_message.Message):
        __slots__ = ("parameters", "timings")
        PARAMETERS_FIELD_NUMBER: _ClassVar[int]
        TIMINGS_FIELD_NUMBER: _ClassVar[int]
        parameters: EffectiveParameters
        timings: Timings
        def __init__(self, parameters: _Optional[_Union[EffectiveParameters, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    RESTARTED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    queued: GenerateEvent.Queued
    started: GenerateEvent.Started
    step: GenerateEvent.Step
    image: GeneratedImage
    done: GenerateEvent.Done
    preview: GenerateEvent.Preview
    restarted: GenerateEvent.Restarted
    def __init__(self, request_id: _Optional[str] = ..., queued: _Optional[_Union[GenerateEvent.Queued, _Mapping]] = ..., started: _Optional[_Union[GenerateEvent.Started, _Mapping]] = ..., step: _Optional[_Union[GenerateEvent.Step, _Mapping]] = ..., image: _Optional[_Union[GeneratedImage, _Mapping]] = ..., done: _Optional[_Union[GenerateEvent.Done, _Mapping]] = ..., preview: _Optional[_Union[GenerateEvent.Preview, _Mapping]] = ..., restarted: _Optional[_Union[GenerateEvent.Restarted, _Mapping]] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "deployment_name", "model", "model_revision", "engine", "dtype", "device", "has_safety_checker", "defaults", "limits", "schedulers", "activity", "replicas", "engine_note", "default_scheduler_class", "default_scheduler_options", "is_default_scheduler_compiled", "num_ranks", "parallelism", "needs_mask", "engine_kernels", "loras", "parts")
    class SchedulersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class DefaultSchedulerOptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class Defaults(_message.Message):
        __slots__ = ("scheduler", "num_inference_steps", "guidance_scale", "height", "width")
        SCHEDULER_FIELD_NUMBER: _ClassVar[int]
        NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
        GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
        HEIGHT_FIELD_NUMBER: _ClassVar[int]
        WIDTH_FIELD_NUMBER: _ClassVar[int]
        scheduler: str
        num_inference_steps: int
        guidance_scale: float
        height: int
        width: int
        def __init__(self, scheduler: _Optional[str] = ..., num_inference_steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...
    class Parts(_message.Message):
        __slots__ = ("num_text_layers", "num_train_timesteps", "num_text_tokens", "text_width", "embeds_guidance")
        NUM_TEXT_LAYERS_FIELD_NUMBER: _ClassVar[int]
        NUM_TRAIN_TIMESTEPS_FIELD_NUMBER: _ClassVar[int]
        NUM_TEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
        TEXT_WIDTH_FIELD_NUMBER: _ClassVar[int]
        EMBEDS_GUIDANCE_FIELD_NUMBER: _ClassVar[int]
        num_text_layers: int
        num_train_timesteps: int
        num_text_tokens: int
        text_width: int
        embeds_guidance: bool
        def __init__(self, num_text_layers: _Optional[int] = ..., num_train_timesteps: _Optional[int] = ..., num_text_tokens: _Optional[int] = ..., text_width: _Optional[int] = ..., embeds_guidance: _Optional[bool] = ...) -> None: ...
    class Lora(_message.Message):
        __slots__ = ("name", "revision", "rank", "shares_calls", "note")
        NAME_FIELD_NUMBER: _ClassVar[int]
        REVISION_FIELD_NUMBER: _ClassVar[int]
        RANK_FIELD_NUMBER: _ClassVar[int]
        SHARES_CALLS_FIELD_NUMBER: _ClassVar[int]
        NOTE_FIELD_NUMBER: _ClassVar[int]
        name: str
        revision: str
        rank: int
        shares_calls: bool
        note: str
        def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., rank: _Optional[int] = ..., shares_calls: _Optional[bool] = ..., note: _Optional[str] = ...) -> None: ...
    class Limits(_message.Message):
        __slots__ = ("max_prompt_chars", "max_num_inference_steps", "max_guidance_scale", "min_size_px", "max_size_px", "max_images_per_prompt")
        MAX_PROMPT_CHARS_FIELD_NUMBER: _ClassVar[int]
        MAX_NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
        MAX_GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
        MIN_SIZE_PX_FIELD_NUMBER: _ClassVar[int]
        MAX_SIZE_PX_FIELD_NUMBER: _ClassVar[int]
        MAX_IMAGES_PER_PROMPT_FIELD_NUMBER: _ClassVar[int]
        max_prompt_chars: int
        max_num_inference_steps: int
        max_guidance_scale: float
        min_size_px: int
        max_size_px: int
        max_images_per_prompt: int
        def __init__(self, max_prompt_chars: _Optional[int] = ..., max_num_inference_steps: _Optional[int] = ..., max_guidance_scale: _Optional[float] = ..., min_size_px: _Optional[int] = ..., max_size_px: _Optional[int] = ..., max_images_per_prompt: _Optional[int] = ...) -> None: ...
    class Replica(_message.Message):
        __slots__ = ("index", "is_ready", "num_restarts", "activity", "devices")
        INDEX_FIELD_NUMBER: _ClassVar[int]
        IS_READY_FIELD_NUMBER: _ClassVar[int]
        NUM_RESTARTS_FIELD_NUMBER: _ClassVar[int]
        ACTIVITY_FIELD_NUMBER: _ClassVar[int]
        DEVICES_FIELD_NUMBER: _ClassVar[int]
        index: int
        is_ready: bool
        num_restarts: int
        activity: GetServerInfoResponse.Activity
        devices: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, index: _Optional[int] = ..., is_ready: _Optional[bool] = ..., num_restarts: _Optional[int] = ..., activity: _Optional[_Union[GetServerInfoResponse.Activity, _Mapping]] = ..., devices: _Optional[_Iterable[str]] = ...) -> None: ...
    class Activity(_message.Message):
        __slots__ = ("uptime_s", "max_slots", "num_running", "num_waiting", "num_steps", "num_images", "num_requests", "num_cancelled_requests", "num_turns", "num_graph_misses", "max_cells_per_call")
        UPTIME_S_FIELD_NUMBER: _ClassVar[int]
        MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
        NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
        NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
        NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
        NUM_IMAGES_FIELD_NUMBER: _ClassVar[int]
        NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
        NUM_CANCELLED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
        NUM_TURNS_FIELD_NUMBER: _ClassVar[int]
        NUM_GRAPH_MISSES_FIELD_NUMBER: _ClassVar[int]
        MAX_CELLS_PER_CALL_FIELD_NUMBER: _ClassVar[int]
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
        max_cells_per_call: int
        def __init__(self, uptime_s: _Optional[float] = ..., max_slots: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_images: _Optional[int] = ..., num_requests: _Optional[int] = ..., num_cancelled_requests: _Optional[int] = ..., num_turns: _Optional[int] = ..., num_graph_misses: _Optional[int] = ..., max_cells_per_call: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HAS_SAFETY_CHECKER_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULERS_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_NOTE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SCHEDULER_CLASS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SCHEDULER_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_SCHEDULER_COMPILED_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    PARALLELISM_FIELD_NUMBER: _ClassVar[int]
    NEEDS_MASK_FIELD_NUMBER: _ClassVar[int]
    ENGINE_KERNELS_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    version: str
    deployment_name: str
    model: str
    model_revision: str
    engine: str
    dtype: str
    device: str
    has_safety_checker: bool
    defaults: GetServerInfoResponse.Defaults
    limits: GetServerInfoResponse.Limits
    schedulers: _containers.ScalarMap[str, str]
    activity: GetServerInfoResponse.Activity
    replicas: _containers.RepeatedCompositeFieldContainer[GetServerInfoResponse.Replica]
    engine_note: str
    default_scheduler_class: str
    default_scheduler_options: _containers.ScalarMap[str, str]
    is_default_scheduler_compiled: bool
    num_ranks: int
    parallelism: str
    needs_mask: bool
    engine_kernels: str
    loras: _containers.RepeatedCompositeFieldContainer[GetServerInfoResponse.Lora]
    parts: GetServerInfoResponse.Parts
    def __init__(self, version: _Optional[str] = ..., deployment_name: _Optional[str] = ..., model: _Optional[str] = ..., model_revision: _Optional[str] = ..., engine: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., has_safety_checker: _Optional[bool] = ..., defaults: _Optional[_Union[GetServerInfoResponse.Defaults, _Mapping]] = ..., limits: _Optional[_Union[GetServerInfoResponse.Limits, _Mapping]] = ..., schedulers: _Optional[_Mapping[str, str]] = ..., activity: _Optional[_Union[GetServerInfoResponse.Activity, _Mapping]] = ..., replicas: _Optional[_Iterable[_Union[GetServerInfoResponse.Replica, _Mapping]]] = ..., engine_note: _Optional[str] = ..., default_scheduler_class: _Optional[str] = ..., default_scheduler_options: _Optional[_Mapping[str, str]] = ..., is_default_scheduler_compiled: _Optional[bool] = ..., num_ranks: _Optional[int] = ..., parallelism: _Optional[str] = ..., needs_mask: _Optional[bool] = ..., engine_kernels: _Optional[str] = ..., loras: _Optional[_Iterable[_Union[GetServerInfoResponse.Lora, _Mapping]]] = ..., parts: _Optional[_Union[GetServerInfoResponse.Parts, _Mapping]] = ...) -> None: ...
