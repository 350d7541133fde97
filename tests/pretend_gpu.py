"""A GPU that is not there: its tensors hold their numbers on the CPU, and refuse what a GPU's tensors refuse.

`install` makes it PyTorch's accelerator, for good, so it is for a process of its own. No operation takes tensors of it
and of the CPU together, but for single numbers, indices and copies; none of its tensors can be pickled or seen by
NumPy. Whatever the number of GPUs, a process sees its own as the first, as autograd wants it. `COUNTS` says how often
the CPU waited for it.
"""

import os
from collections import Counter
from unittest import mock

import torch
import torch.distributed as dist
from lightning.fabric.accelerators import ACCELERATOR_REGISTRY, Accelerator
from lightning.fabric.strategies import DDPStrategy
from torch.distributed import Backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
NUM_GPUS = int(os.environ.get("PRETEND_GPUS", "1"))
COUNTS: Counter[str] = Counter()
MAY_MIX = {  # copies, and operations with indices
    torch.ops.aten.copy_.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class MixedDevices(RuntimeError):
    """What PyTorch says of tensors on different devices."""


class Pretend(torch.Tensor):
    """A tensor on the GPU that is not there."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device(NAME, 0), **layout)

    def __init__(self, held):
        self.held = held

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        self.held = value.held

    def numpy(self, *args, **kwargs):
        raise MixedDevices("numpy() of a tensor on the GPU")

    def tolist(self):
        COUNTS["waits"] += 1
        return self.held.tolist()

    def __reduce_ex__(self, protocol):
        raise MixedDevices("a tensor on the GPU is pickled")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Sees the operations that make tensors out of none, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_gpu(kwargs.get("device")) or any(isinstance(leaf, Pretend) for leaf in tree_leaves((args, kwargs))):
            return dispatch(func, args, kwargs)
        return func(*args, **kwargs)


def is_gpu(device):
    return device is not None and torch.device(device).type == NAME


def dispatch(func, args, kwargs):
    """Do on the CPU what is to be done on the GPU."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, Pretend) and tensor.dim() > 0]
    if on_gpu and on_cpu and func not in MAY_MIX:
        raise MixedDevices(f"{func} of tensors on the GPU and on the CPU")
    device = kwargs.get("device")
    if func is torch.ops.aten._local_scalar_dense.default:
        COUNTS["waits"] += 1
    if device is not None and on_gpu and not is_gpu(device):
        COUNTS["downloads"] += 1
    args, kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, Pretend) else leaf, (args, kwargs))
    if is_gpu(device):
        kwargs["device"] = "cpu"
    result = func(*args, **kwargs)
    stays = is_gpu(device) if device is not None else bool(on_gpu)
    if func is torch.ops.aten.copy_.default:
        stays = not any(result is tensor for tensor in tensors)
        COUNTS["downloads"] += not stays
    if not stays:
        return result
    known = {id(tensor.held): tensor for tensor in on_gpu}  # an operation in place returns what it was given

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        return known.get(id(value)) if id(value) in known else Pretend(value)

    return tree_map(wrap, result)


class Module:
    """What `torch.pretend` has to offer."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: NUM_GPUS)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)
    synchronize = staticmethod(lambda device=None: None)
    manual_seed_all = staticmethod(lambda seed: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


class PretendAccelerator(Accelerator):
    """The same for Fabric."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(NAME, device % NUM_GPUS) for device in devices]

    @staticmethod
    def auto_device_count():
        return NUM_GPUS

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return NAME


def made_on_the_cpu(make):
    """PyTorch makes such a tensor on the CPU and moves it, below the level that a mode sees."""

    def made(*args, device=None, **kwargs):
        device = device or (args[0].device if isinstance(args[0], Pretend) else None)
        if not is_gpu(device):
            return make(*args, device=device, **kwargs)
        args = [arg.held if isinstance(arg, Pretend) else arg for arg in args]
        return Pretend(make(*args, device="cpu", **kwargs))

    return made


def pretend_nccl():
    """Let gloo stand in for NCCL, which takes no tensor that is not on a GPU."""
    Backend.default_device_backend_map[NAME] = "nccl"
    init_process_group, new_group, get_backend = dist.init_process_group, dist.new_group, dist.get_backend
    groups = set()

    def init(backend=None, *args, device_id=None, **kwargs):
        init_process_group("gloo" if backend == "nccl" else backend, *args, **kwargs)
        if backend == "nccl":
            groups.add(dist.group.WORLD)

    def new(*args, backend=None, **kwargs):
        group = new_group(*args, backend="gloo" if backend == "nccl" else backend, **kwargs)
        if backend == "nccl":
            groups.add(group)
        return group

    def checked(message):
        def send(*args, group=None, **kwargs):
            if (group or dist.group.WORLD) in groups and not isinstance(args[0], Pretend):
                raise MixedDevices("a tensor of the CPU in a message of NCCL")
            return message(*args, group=group, **kwargs)

        return send

    dist.init_process_group, dist.new_group = init, new
    dist.get_backend = lambda group=None: "nccl" if (group or dist.group.WORLD) in groups else get_backend(group)
    for name in ("all_reduce", "broadcast", "all_gather_single", "send", "recv"):
        setattr(dist, name, checked(getattr(dist, name)))


def install():
    """Make it the accelerator of PyTorch and one of Fabric's."""
    _setup_privateuseone_for_python_backend(NAME, Module())
    ACCELERATOR_REGISTRY.register(NAME, PretendAccelerator)
    pretend_nccl()
    torch.tensor = made_on_the_cpu(torch.tensor)
    Pretend.new_tensor = made_on_the_cpu(torch.Tensor.new_tensor)
    DDPStrategy._determine_ddp_device_ids = lambda self: None  # else it asks CUDA for a stream
    torch.__future__.set_swap_module_params_on_conversion(True)  # an optimizer knows the parameters already
    Mode().__enter__()


def do_not_compile():
    """Let `torch.compile` return what it is given, which takes the ways that it takes when it is compiled."""

    def compile(function, **_):
        def call(*args):
            with mock.patch("torch.compiler.is_compiling", return_value=True):
                return function(*args)

        return call

    torch.compile = compile
