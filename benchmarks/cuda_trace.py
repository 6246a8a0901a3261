"""What code on CUDA tensors would launch, traced on fake tensors: kernels, arithmetic, bytes, copies and waits.

Most of it is what PyTorch dispatches. What its fake tensors do not know is modelled as PyTorch and cuDNN are known to act:

- a convolution is one kernel, in channels last where its input or its weight is, after a copy of an input that is not; its bias
  is a kernel of its own;
- a GroupNorm is three kernels that pass over its input three times, after a copy of an input in channels last;
- an attention in half precision is one flash kernel, whatever its head width; any other is one memory-efficient kernel;
- bytes are those of each kernel's inputs and outputs, as if no cache held any of them;
- our own kernels report theirs through `Trace.launch`.
"""

from __future__ import annotations

import collections
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten: Any = torch.ops.aten

VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided",
    "expand", "lift_fresh", "narrow", "new_empty", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip
"""They launch nothing."""

IN_PLACE = {"addmm_": aten.addmm, "baddbmm_": aten.baddbmm}
"""Products whose arithmetic is that of another operation."""

WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2", "unique_dim"}
"""They wait for the device: the host reads what it has computed."""

COPIES = {"_to_copy", "clone", "copy_"}
WRITES_ONLY = {"arange", "fill_", "full", "new_zeros", "ones", "zero_", "zeros", "zeros_like"}
KEPT_WHOLE = {
    aten.native_group_norm.default,
    aten.native_layer_norm.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d.vec,
}
"""Their decompositions are not what runs on CUDA."""

ALLOCATION_BYTES = 512
"""The caching allocator rounds up to it."""
MAX_FLASH_HEAD = 256
FLASH_HEAD_MULTIPLE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One operation on the device. `site` is the line of the project or its libraries that asked for it."""

    name: str
    num_kernels: int = 1
    flops: int = 0
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_layout_conversion: bool = False
    is_copy: bool = False
    site: str = ""


@dataclass
class Record:
    """All that a trace found. `waits` counts for each place what makes the host wait, blocking copies among it."""

    launches: list[Launch] = field(default_factory=list)
    waits: collections.Counter[str] = field(default_factory=collections.Counter)
    peak_bytes: int = 0
    """The most that was allocated on the device at once since the trace began."""

    @property
    def num_kernels(self) -> int:
        return sum(launch.num_kernels for launch in self.launches)

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    @property
    def num_bytes(self) -> int:
        return sum(launch.num_bytes for launch in self.launches)

    @property
    def layout_conversions(self) -> list[Launch]:
        return [launch for launch in self.launches if launch.is_layout_conversion]

    @property
    def copies(self) -> list[Launch]:
        """Clones and casts that convert no layout."""
        return [launch for launch in self.launches if launch.is_copy and not launch.is_layout_conversion]

    @property
    def in_float64(self) -> list[Launch]:
        return [launch for launch in self.launches if launch.dtype == torch.float64]

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The roofline: each operation takes as long as its arithmetic or its bytes at the peaks, whichever is longer."""
        return sum(max(launch.flops / flops_per_s, launch.num_bytes / bytes_per_s) for launch in self.launches)

    def by_name(self) -> Iterator[tuple[str, int, int]]:
        """Name, kernels and bytes of each kind of operation, the most bytes first."""
        sums: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        for launch in self.launches:
            sums[launch.name][0] += launch.num_kernels
            sums[launch.name][1] += launch.num_bytes
        yield from sorted(((name, *both) for name, both in sums.items()), key=lambda one: -one[2])


class Trace(TorchDispatchMode):
    """Enter it inside of `fake_cuda`; what is dispatched in the block is in `record`."""

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()
        self._live_bytes = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._pinned: weakref.WeakSet[Any] = weakref.WeakSet()
        self._attention = _FlashAttention()

    def __enter__(self) -> Trace:
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)

    def begin(self) -> None:
        """Forget what was recorded; what is allocated stays, and does not count."""
        self.record, self._live_bytes = Record(), 0

    def wait(self, what: str) -> None:
        """The host waits for the device in a way that PyTorch does not dispatch; called by a double of it."""
        self.record.waits[f"{what} at {_site(sys._getframe(2))}"] += 1

    def launch(self, name: str, tensors: Sequence[torch.Tensor], *, flops: int = 0) -> None:
        """A kernel that PyTorch does not dispatch, which reads or writes each of the tensors once."""
        self._add(name, tensors[-1], sum(map(_bytes, tensors)), flops=flops)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func not in KEPT_WHOLE and func._overloadpacket not in flop_registry and func._can_decompose():
            with self, torch._C.DisableTorchFunction():
                if (made := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return made
        if name == "_pin_memory" or kwargs.pop("pin_memory", False):
            pinned = args[0].clone() if name == "_pin_memory" else func(*args, **kwargs)
            self._pinned.add(pinned.untyped_storage())
            return pinned
        if name == "convolution":
            return self._convolution(func, args, kwargs)
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if name in WAITS and any(one.is_cuda for one in inputs):
            self.record.waits[f"{name} at {_site()}"] += 1
        if name == "_local_scalar_dense":  # what it would be is not known
            return True if args[0].dtype == torch.bool else 0
        made = func(*args, **kwargs)
        outputs = [one for one in tree_leaves(made) if isinstance(one, torch.Tensor)]
        for one in outputs:
            self._hold(one)
        if name in COPIES:
            is_async = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            self._check_transfer(name, args, made, is_async=bool(is_async))
        if any(one.is_cuda for one in outputs) and name not in VIEWS:
            self._dispatched(func, name, args, inputs, outputs, made, kwargs)
        return made

    def _dispatched(
        self, func: Any, name: str, args: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor], made: Any, kwargs: Any
    ) -> None:
        first = next(one for one in outputs if one.is_cuda)
        num_bytes = sum(_bytes(one) for one in (*inputs, *outputs) if one.is_cuda)
        flops = 0
        counted = IN_PLACE.get(name, func._overloadpacket)
        if (count := flop_registry.get(counted)) is not None:
            flops = count(*args, **kwargs, out_val=made)
        if name == "native_group_norm":
            if _is_channels_last(args[0]):
                self._add("group_norm: input to NCHW", args[0], 2 * _bytes(args[0]), is_layout_conversion=True, is_copy=True)
            self._add(name, first, 3 * _bytes(args[0]), num_kernels=3)
            return
        if name == "index":  # reads no more than it gathers
            num_bytes = 2 * _bytes(first)
        elif name == "index_put_":
            num_bytes = 2 * _bytes(args[2])
        elif name in WRITES_ONLY:
            num_bytes = _bytes(first)
        elif name == "copy_":
            num_bytes = sum(_bytes(one) for one in args[:2] if one.is_cuda)
        source, target = _source_and_target(name, args, made) if name in COPIES else (None, None)
        is_conversion = source is not None and target is not None and _converts_layout(source, target)
        self._add(name, first, num_bytes, flops=flops, is_layout_conversion=is_conversion, is_copy=name in COPIES)

    def _convolution(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        image, weight, bias = args[:3]
        is_channels_last = _is_channels_last(image) or _is_channels_last(weight)
        if is_channels_last and not image.is_contiguous(memory_format=torch.channels_last):
            copied = torch.empty_like(image, memory_format=torch.channels_last)
            self._hold(copied)
            self._add("convolution: input to NHWC", image, 2 * _bytes(image), is_layout_conversion=True, is_copy=True)
        made = func(image, weight, None, *args[3:], **kwargs)
        if is_channels_last:
            made = made.contiguous(memory_format=torch.channels_last)
        self._hold(made)
        flops = flop_registry[aten.convolution](*args, **kwargs, out_val=made)
        self._add("convolution", made, sum(map(_bytes, (image, weight, made))), flops=flops)
        if bias is not None:
            self._add("convolution: bias", made, 2 * _bytes(made))
        return made

    def _add(self, name: str, shown: torch.Tensor, num_bytes: int, **about: Any) -> None:
        launch = Launch(name=name, num_bytes=num_bytes, shape=tuple(shown.shape), dtype=shown.dtype, site=_site(), **about)
        self.record.launches.append(launch)

    def _check_transfer(self, name: str, args: Any, made: Any, *, is_async: bool) -> None:
        source, target = _source_and_target(name, args, made)
        if source.is_cuda == target.is_cuda:
            return
        host = target if source.is_cuda else source
        if not (is_async and host.untyped_storage() in self._pinned):
            direction = "device to host" if source.is_cuda else "pageable host to device"
            self.record.waits[f"copy {direction} at {_site()}"] += 1

    def _hold(self, tensor: torch.Tensor) -> None:
        """Count the tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        if not tensor.is_cuda or storage in self._known:
            return
        self._known.add(storage)
        size = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self._live_bytes += size
        self.record.peak_bytes = max(self.record.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._live_bytes -= size


class _FlashAttention(TorchFunctionMode):
    """What PyTorch takes on CUDA; on fake tensors it would take the one that keeps all scores."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or not args[0].is_cuda:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        scale, is_causal = kwargs.get("scale"), kwargs.get("is_causal", False)
        head = query.shape[-1]
        is_half = query.dtype in (torch.float16, torch.bfloat16)
        if is_half and head % FLASH_HEAD_MULTIPLE == 0 and head <= MAX_FLASH_HEAD and kwargs.get("attn_mask") is None:
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)[0]
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, False, 0.0, is_causal, scale=scale)[0]


def _source_and_target(name: str, args: Any, made: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (args[1], args[0]) if name == "copy_" else (args[0], made)


def _converts_layout(source: torch.Tensor, target: torch.Tensor) -> bool:
    return source.dim() == 4 and target.dim() == 4 and _is_channels_last(source) != _is_channels_last(target)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """As cuDNN's wrapper decides it: a tensor of one pixel or one channel is so by its strides alone."""
    from torch._prims_common import suggest_memory_format

    return tensor.dim() == 4 and suggest_memory_format(tensor) == torch.channels_last


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _site(frame: Any = None) -> str:
    """The innermost line that is neither torch's nor this file's."""
    frame = frame or sys._getframe(1)
    while frame.f_back is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/mii_serve/')[2].rpartition('site-packages/')[2]}:{frame.f_lineno}"
