"""A GPU that is none, in cuda's place: it computes on the CPU, and refuses what a GPU refuses.

torch's PrivateUse1 device, written in Python: a tensor on it holds an ordinary one and says device "pretend". Operators
whose operands lie on both devices raise as on a GPU; numpy() does, too. So code that forgot to move a module or a batch
fails here. What computed on the CPU altogether would not: `PretendGpu.here` lists every matrix product, convolution,
norm and attention that did.

The device is registered for the whole process and for good, and torch's autograd must not have run before: use it in a
process of its own (tests/truth/device_proof.py).
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
ROOT = Path(__file__).resolve().parents[2]
COMPUTES = {
    "mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "native_layer_norm", "native_group_norm",
    "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training", "embedding",
    "_scaled_dot_product_flash_attention_for_cpu", "_fused_adamw_", "_native_multi_head_attention",
}  # fmt: skip
BRINGS = {"_to_copy", "copy_", "_copy_from"}  # from one device to another
TAKES_INDICES = {"index", "index_put", "index_put_", "_unsafe_index"}  # which a GPU takes from the CPU


class Backend:
    """What torch asks of torch.pretend."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    _lazy_init = staticmethod(lambda: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


class PretendTensor(torch.Tensor):
    """On the device `pretend`; inner: where the numbers are."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendTensor:
        facts = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, **facts, device=torch.device(NAME, 0), requires_grad=inner.requires_grad
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch does not for a tensor that is written in Python

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return act(func, args, kwargs or {}, PretendGpu.recent)


class PretendGpu(TorchDispatchMode):
    """Inside, tensors can be made on the device. here: {operator and line of ours: how often} of what the CPU computed;
    there: {operator: how often} of what the device did."""

    recent: PretendGpu | None = None

    def __init__(self) -> None:
        super().__init__()
        self.here: Counter[str] = Counter()
        self.there: Counter[str] = Counter()
        PretendGpu.recent = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return act(func, args, kwargs or {}, self)


def act(func: Any, args: Any, kwargs: dict[str, Any], record: PretendGpu | None) -> Any:
    name = func._schema.name.partition("::")[2]
    tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    mine = [item for item in tensors if isinstance(item, PretendTensor)]
    check_places(name, args, tensors, mine)
    asked = kwargs.get("device")
    there = bool(mine) if asked is None else torch.device(asked).type == NAME
    if name == "_pin_memory":
        return args[0]
    if record is not None and name in COMPUTES:
        if there:
            record.there[name] += 1
        elif not any(item.is_meta for item in tensors):  # shapes alone are no computing
            record.here[f"{name} at {line_of_ours()}"] += 1
    out = func(*tree_map(inside, args), **tree_map(inside, kwargs))
    if name == "copy_":
        return args[0]
    if there:
        out = tree_map(lambda item: PretendTensor(item) if type(item) is torch.Tensor else item, out)
    changes = any(arg.alias_info is not None for arg in func._schema.arguments)
    return return_and_correct_aliasing(func, args, kwargs, out) if mine and there and changes else out


def check_places(name: str, args: Any, tensors: list[torch.Tensor], mine: list[torch.Tensor]) -> None:
    """Raises RuntimeError where a GPU would. A CPU's number without dimensions is taken as a number."""
    for item in tensors:
        if item.device.type == NAME and not isinstance(item, PretendTensor):
            raise RuntimeError(f"{name}: a {type(item).__name__} says it is on {NAME} and is not")
    others = [item for item in tensors if item.device.type == "cpu" and item.dim() > 0]
    if not mine or not others or name in BRINGS:
        return
    if name in TAKES_INDICES and isinstance(args[0], PretendTensor):
        others = [item for item in others if item.dtype not in (torch.int64, torch.bool)]
    if others:
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {NAME}:0 and cpu")


def inside(item: Any) -> Any:
    if isinstance(item, PretendTensor):
        return item.inner
    return torch.device("cpu") if isinstance(item, torch.device) and item.type == NAME else item


def line_of_ours() -> str:
    """The innermost line of the project that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith((f"{ROOT}/raphael", f"{ROOT}/data_pipeline", f"{ROOT}/flows")):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "the tests"


def new(size: Any, stride: Any = None, **facts: Any) -> PretendTensor:
    facts = {"dtype": facts.get("dtype")}
    return PretendTensor(torch.empty(size, **facts) if stride is None else torch.empty_strided(size, stride, **facts))


def fill(tensor: PretendTensor, source: torch.Tensor, non_blocking: bool = False) -> PretendTensor:
    tensor.inner.copy_(inside(source))
    return tensor


KERNELS = torch.library.Library("aten", "IMPL")  # what torch.tensor(..., device=...) asks for beside every mode
NOT_CAST = torch.library.Library("_", "IMPL")
CAST = ("conv2d", "linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product_attention")  # as cuda's are


def autocasting(name: str) -> Any:
    """The operator under autocast: float32 operands on the device take autocast's type."""
    operator = getattr(torch.ops.aten, name)
    itself = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(item: Any) -> Any:
        mine = isinstance(item, torch.Tensor) and item.device.type == NAME and item.dtype == torch.float32
        return item.to(torch.get_autocast_dtype(NAME)) if mine else item

    def act_in_it(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(itself):
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return act_in_it


def install() -> None:
    """Let this process believe in the device, and `device: cuda` and `auto` mean it. Before our modules are imported:
    their inference mode, in which torch makes no views of tensors that are written in Python, becomes no_grad."""
    torch.inference_mode = torch.no_grad
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    from raphael.base import devices

    _setup_privateuseone_for_python_backend(NAME, Backend)
    KERNELS.impl("empty.memory_format", new, "PrivateUse1")
    KERNELS.impl("empty_strided", new, "PrivateUse1")
    KERNELS.impl("copy_", fill, "PrivateUse1")
    NOT_CAST.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in CAST:
        KERNELS.impl(name, autocasting(name), "AutocastPrivateUse1")
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a Parameter's own type cannot change in place
    devices.GPU, devices.has_gpu = NAME, lambda: True
