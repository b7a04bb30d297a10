"""A second device for machines that have no GPU: `second:0`.

Its tensors live in the memory of the CPU and are computed there, but no operation takes them beside tensors of the CPU,
and they become no arrays, as on a GPU: code that mixes devices fails here too. What it cannot show is what kernels of a
GPU compute, how fast, and in how much memory.

`import second_device` before anything else that uses torch; `move_in()` makes stepwise, transformers and bitsandbytes
put models and batches there. Built on torch's hooks for backends written in Python, for the whole process.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
import torch.utils._device
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

calls: Counter[str] = Counter()  # operations on the device, by name

_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_TAKES_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # a GPU reads those of a CPU
_FACTORIES = ["arange", "arange.start", "arange.start_step", "randperm", "randperm.generator", "linspace", "eye"]
_IN_16_BITS = ["linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"]
_IN_32_BITS = ["exp", "log", "softmax.int", "log_softmax.int", "pow.Tensor_Scalar", "rsqrt", "layer_norm", "cumsum"]


class _Backend(backend_registration._DummyBackendModule):
    """torch.second, as far as libraries ask for it."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


backend_registration._setup_privateuseone_for_python_backend("second", backend_module=_Backend())
SECOND = torch.device("second:0")


class Second(torch.Tensor):
    """A tensor of the device: `raw` holds its numbers."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Second:
        like = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, raw.shape, device=SECOND, **like)
        self.raw = raw
        return self

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})

    @property
    def data(self) -> Second:
        return Second(self.raw.detach())

    @data.setter
    def data(self, value: Second) -> None:
        torch.Tensor.data.__set__(self, value)
        self.raw = value.raw

    def tolist(self) -> Any:
        return self.raw.tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, **options: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype).to(SECOND)

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert a tensor of second:0 to numpy; use Tensor.cpu() first")

    def __array__(self, *options: Any) -> Any:
        return self.numpy()


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the numbers of its operands, if they are on one device; its result is on the device too."""
    own: list[Second] = []
    others: list[torch.Tensor] = []

    def number(value: Any) -> Any:
        if isinstance(value, Second):
            own.append(value)
            return value.raw
        if isinstance(value, torch.Tensor):
            others.append(value)
        return value

    numbers, options = tree_map(number, args), tree_map(number, kwargs)
    name = op.overloadpacket.__name__
    calls[name] += 1
    indexed = name in _TAKES_INDICES and isinstance(args[0], Second)
    if own and op not in _COPIES and not indexed and any(other.dim() for other in others):
        raise RuntimeError(f"{name}: expected all tensors on one device, found second:0 and {others[0].device}")
    target = options.get("device")
    if target is not None:
        options |= {"device": "cpu", "pin_memory": False} if "pin_memory" in options else {"device": "cpu"}
    found = op(*numbers, **options)
    if op is _aten.copy_.default:
        return args[0]
    if op is _aten._to_copy.default and target is not None and torch.device(target).type == "cpu":
        return found
    known = {id(tensor.raw): tensor for tensor in own} | {id(tensor): tensor for tensor in others}

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else Second(value)

    return tree_map(place, found)


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(_aten, packet), overload or "default")


def _make(op: Any, *args: Any, dtype: Any = None, generator: Any = None, **options: Any) -> Second:
    kept = {"generator": generator} if generator else {}
    return Second(op(*args, dtype=dtype, device="cpu", **kept))


def _autocast(op: Any, given: set[torch.dtype], wanted: torch.dtype, *args: Any, **options: Any) -> Any:
    def cast(value: Any) -> Any:
        return value.to(wanted) if isinstance(value, torch.Tensor) and value.dtype in given else value

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return op(*tree_map(cast, args), **tree_map(cast, options))


def _build(real: Any, data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    if isinstance(data, Second):
        return data.to(device or SECOND, options.get("dtype") or data.dtype)
    built: torch.Tensor = real(data, **options)
    return built if device is None else built.to(device)


def _register() -> list[torch.library.Library]:
    """Say how tensors of the device are made, and what autocast does to them."""
    library, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")

    def empty(size: Any, dtype: Any = None, *ignored: Any, **options: Any) -> Second:
        return Second(torch.empty(size, dtype=dtype or torch.get_default_dtype()))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, *ignored: Any, **options: Any) -> Second:
        return Second(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    for name in _FACTORIES:
        library.impl(name, partial(_make, _overload(name)), "PrivateUse1")

    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, given, wanted in (
        (_IN_16_BITS, {torch.float32}, torch.bfloat16),
        (_IN_32_BITS, {torch.float16, torch.bfloat16}, torch.float32),
    ):
        for name in names:
            library.impl(name, partial(_autocast, _overload(name), given, wanted), "AutocastPrivateUse1")

    torch.inference_mode = torch.no_grad  # in inference mode operations arrive whole, not in the parts above
    torch.utils._device._device_constructors()  # remembers torch.tensor, before it is replaced
    for name in ("tensor", "as_tensor"):  # they leave the hooks for Python out of their copy to a device
        setattr(torch, name, partial(_build, getattr(torch, name)))
    return [library, fallback]


def move_in() -> None:
    """From now on models are loaded onto the device, and batches of a training go there."""
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, TrainingArguments

    from stepwise import classifier, policy

    policy.device = classifier.device = lambda: str(SECOND)
    TrainingArguments.device = property(lambda self: SECOND)
    begin = PartialState.__init__

    def begin_there(self: PartialState, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self.device = SECOND

    PartialState.__init__ = begin_there
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: Any, **options: Any) -> Any:
        if "quantization_config" not in options:
            return load(*args, **options)
        found = load(*args, **options | {"device_map": {"": "cpu"}})  # bitsandbytes makes tensors of a class of its own
        _carry(found[0] if isinstance(found, tuple) else found)
        return found

    AutoModelForCausalLM.from_pretrained = from_pretrained


def _carry(model: torch.nn.Module) -> None:
    """Move a model with 4-bit weights onto the device."""
    import bitsandbytes

    class Weight(Second, bitsandbytes.nn.Params4bit):
        def __new__(cls, raw: torch.Tensor) -> Any:
            return Second.__new__(cls, raw)

        __torch_function__ = Second.__torch_function__

        def to(self, *args: Any, **options: Any) -> Any:
            return self

        def t(self) -> Any:
            return self

    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    weights = [layer._parameters.pop("weight") for layer in layers]
    torch.nn.Module.to(model, SECOND)
    for layer, weight in zip(layers, weights, strict=True):
        moved, state = Weight(weight.data.as_subclass(torch.Tensor).detach()), weight.quant_state
        vars(moved).update(vars(weight) | {"_is_param": True, "module": layer})
        for part in (state, state.state2):
            part.absmax, part.code = part.absmax.to(SECOND), part.code.to(SECOND)
        state.offset = state.offset.to(SECOND)
        layer._parameters["weight"] = moved
    model.hf_device_map = {"": str(SECOND)}


_LIBRARIES = _register()  # what they register ends with them
