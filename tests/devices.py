"""A device that this machine does not have, pretended.

Its tensors are on the CPU and carry a mark; every operation under :class:`TwoDevices` gives a
marked result from marked tensors, and fails as a real one would where both kinds meet, or under
:class:`WithoutFloat64` where a marked one would be float64.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

FAR = torch.device("cuda", 7)


class Far(Tensor):
    """A tensor on the pretended device."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def marked(out, far):
    return tree_map_only(
        Tensor, lambda t: t.as_subclass(Far) if far and type(t) is not Far else t, out
    )


class TwoDevices(TorchFunctionMode):
    device = FAR

    def __init__(self):
        super().__init__()
        self.moves = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return self.device if type(args[0]) is Far else func(*args)
        if func == Tensor.shape.__get__:  # not a tuple, as the tree functions would make of it
            return func(*args)
        if (
            name == "_has_compatible_shallow_copy_type"
        ):  # a module that is moved then takes new parameters, marked ones
            return type(args[0]) is not Far and type(args[1]) is not Far
        if name in ("to", "cpu"):
            return self.move(args[0], ("cpu",) if name == "cpu" else args[1:], kwargs)
        if func is torch.autograd.grad:  # through both
            return tuple(
                marked(g, type(x) is Far)
                for g, x in zip(func(*args, **kwargs), args[1], strict=True)
            )
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked) == self.device:
            return marked(func(*args, **kwargs | {"device": "cpu"}), True)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        far = [type(t) is Far for t in tensors]
        if (
            name == "copy_" or name == "__setitem__" and len(tensors) == 2
        ):  # the latter without tensors among its indices is a copy
            return func(*args, **kwargs)
        if (
            name in ("__getitem__", "__setitem__", "index_put", "index_put_") and far[0]
        ):  # indices may be on the host
            tensors, far = [t for t in tensors if t.dtype not in (torch.long, torch.bool)], [True]
        if any(far) and any(t.dim() for t in tensors if type(t) is not Far):
            raise RuntimeError(f"{name}: tensors on two devices")
        return marked(func(*args, **kwargs), any(far))

    def move(self, x, args, kwargs):
        far, rest = type(x) is Far, []
        for a in (*args, *([kwargs.pop("device")] if kwargs.get("device") is not None else [])):
            if isinstance(a, Tensor):
                far = type(a) is Far
                rest.append(a.dtype)
            elif isinstance(a, (str, torch.device)):
                far = torch.device(a) == self.device
            elif isinstance(a, torch.dtype):  # and not non_blocking
                rest.append(a)
        out = x.to(*rest, **kwargs) if rest or kwargs else x
        if far == (type(x) is Far):
            return marked(out, far)
        self.moves += 1
        return out.clone().as_subclass(Far if far else Tensor)


class WithoutFloat64(TwoDevices):
    """The far device is Apple's MPS: no float64, not even on the way to the CPU, and no
    eigenvectors."""

    device = torch.device("mps")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("linalg_eigh", "linalg_svd") and type(args[0]) is Far:
            raise NotImplementedError(f"{name}: not implemented on MPS")
        out = super().__torch_function__(func, types, args, kwargs)
        if any(type(t) is Far and t.dtype == torch.float64 for t in tree_leaves(out)):
            raise TypeError(f"{name}: MPS has no float64")
        return out

    def move(self, x, args, kwargs):
        wanted = [*args, *kwargs.values()]
        dtypes = [a.dtype if isinstance(a, Tensor) else a for a in wanted]
        if type(x) is Far and torch.float64 in dtypes:
            raise TypeError("MPS casts before it copies: move to the CPU first")
        return super().move(x, args, kwargs)
