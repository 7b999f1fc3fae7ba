"""Bytes of tensors alive, counted storage by storage: the same number on every machine and device.

live     bytes of the storages alive that were allocated inside the block
peak     the largest value of live, looked at after every operation
outside  a storage that was there before: parameters, buffers, the batch. Never counted
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from reversa.errors import SettingError

Excluded = nn.Module | Tensor | Iterable[nn.Module | Tensor]


class LiveBytes:
    r"""Count the bytes of tensors alive that were allocated inside a ``with`` block.

    .. math:: \text{live} = \sum_{s \,\text{alive, allocated inside}} \text{bytes}(s), \qquad
              \text{peak} = \max_{\text{operations}} \text{live}

    The sum runs over storages: a view costs nothing, an expanded tensor what its storage has, a sparse tensor its
    indices and values, a storage that was resized its new size. What existed before (parameters, buffers, the batch)
    is not counted. The backward pass is counted wherever autograd runs it.

    Gradients of ``exclude`` count like any other temporary tensor while the backward pass computes them, and no
    longer from the moment that they are accumulated into ``.grad``: the peak is that of activations, temporaries, and
    one parameter's gradient at a time. Gradients that :func:`torch.autograd.grad` returns are counted.

    After the block nothing more is added, while :attr:`live` still falls as tensors are freed.

    Not seen: workspaces inside one kernel, states of random generators (5 kB each on the CPU), code made by
    ``torch.compile``, other threads of the user's, the rounding and the cache of a device's allocator (on CUDA,
    :func:`torch.cuda.max_memory_allocated` has them). Optimizer states are tensors like any other: measure the
    forward and the backward pass alone.

    Args:
        exclude: a module, a tensor, or several of them, whose gradients are not counted.
        device: count on this device only; None: on every device that has memory. Meta and fake tensors have none; with
            ``"meta"`` they count as what they stand for.

    Raises:
        SettingError: ``exclude`` holds something that is neither a module nor a tensor.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh(), torch.nn.Linear(256, 256))
    >>> x = torch.zeros(1024, 256)
    >>> with LiveBytes(exclude=model) as bytes_:
    ...     y = model(x)
    ...     print(bytes_.live // x.nbytes, "activations held after the forward pass")
    ...     y.sum().backward()
    2 activations held after the forward pass
    >>> bytes_.live == y.nbytes
    True
    """

    def __init__(self, exclude: Excluded | None = None, device: torch.device | str | None = None) -> None:
        self._leaves: Final = [leaf for leaf in _tensors_of(exclude) if leaf.is_leaf and leaf.requires_grad]
        self._device: Final = None if device is None else torch.device(device)
        self._sizes: Final[dict[int, int]] = {}
        self._storages: Final[dict[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._sum = 0
        self._peak = 0
        self._mode: Final = _EveryOperation(self._run)
        self._hooks: list[RemovableHandle] = []

    @property
    def live(self) -> int:
        """Bytes alive now."""
        self._look_again()
        return self._sum

    @property
    def peak(self) -> int:
        """The largest number of bytes alive since the beginning, or since :meth:`reset_peak`."""
        return max(self._peak, self.live)

    def reset_peak(self) -> None:
        """Begin the peak anew, at the bytes alive now."""
        self._peak = self.live

    def __enter__(self) -> LiveBytes:
        self._hooks = [leaf.register_post_accumulate_grad_hook(self._gradient_is_there) for leaf in self._leaves]
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __repr__(self) -> str:
        return f"LiveBytes(live={self.live:,}, peak={self.peak:,})"

    # ------------------------------------------------------------------ counting

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation, and look at its tensors."""
        result = func(*args, **kwargs)
        # torch.tensor(data) allocates unseen, and this operation alone is told of it.
        given = () if func is torch.ops.aten.lift_fresh.default else (*_tensors_in(args), *_tensors_in(kwargs))
        self._note(given, _tensors_in(result))
        return result

    def _note(self, given: Iterable[Tensor], returned: Iterable[Tensor]) -> None:
        """Look at the storages of one operation: those it returns and was not given are new."""
        known = {storage._cdata for tensor in given for storage in storages(tensor)}
        for tensor in returned:
            for storage in storages(tensor):
                if storage._cdata not in known:
                    self._add(storage)
        for key in known & self._sizes.keys():
            self._measure(key)
        if self._sum > self._peak:
            self._look_again()  # a storage may have been emptied without an operation: before a peak, ask them all
            self._peak = max(self._peak, self._sum)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes or not self._counts(storage.device):
            return
        self._sizes[key] = 0
        self._storages[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._measure(key)

    def _measure(self, key: int) -> None:
        reference = self._storages.get(key)
        if reference is not None and (storage := reference()) is not None:
            self._change(key, storage.nbytes())

    def _change(self, key: int, size: int) -> None:
        self._sum += size - self._sizes[key]
        self._sizes[key] = size

    def _forget(self, key: int) -> None:
        if key in self._sizes:
            self._change(key, 0)
            del self._sizes[key], self._storages[key]

    def _look_again(self) -> None:
        for key, reference in list(self._storages.items()):
            storage = reference()
            if storage is not None and storage.nbytes() != self._sizes.get(key):
                self._measure(key)

    def _counts(self, device: torch.device) -> bool:
        wanted = self._device
        if wanted is None:
            return device.type != "meta"
        return device.type == wanted.type and wanted.index in (None, device.index)

    def _gradient_is_there(self, leaf: Tensor) -> None:
        if leaf.grad is not None:
            for storage in storages(leaf.grad):
                self._forget(storage._cdata)


class _EveryOperation(TorchDispatchMode):
    """Let ``run`` run every operation, below autograd."""

    def __init__(self, run: Callable[[Any, Any, dict[str, Any]], Any]) -> None:
        super().__init__()
        self.run: Final = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(_wraps_tensors(kind) for kind in types):
            return NotImplemented  # the subclass calls operations on the tensors inside it: those are counted
        return self.run(func, args, kwargs or {})


def _wraps_tensors(kind: type) -> bool:
    """Whether tensors of that class are made of other tensors (DTensor, jagged nested tensors)."""
    return hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an operation's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages that a tensor keeps alive."""
    if _wraps_tensors(type(tensor)):
        for name in cast(Any, tensor).__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout is torch.sparse_coo:
        yield from (part.untyped_storage() for part in (tensor._indices(), tensor._values()))
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
        yield from (part.untyped_storage() for part in parts)
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
        yield from (part.untyped_storage() for part in parts)


def _tensors_of(exclude: Excluded | None) -> Iterator[Tensor]:
    """The tensors that ``exclude`` names, each once."""
    if exclude is None:
        return
    items: list[Any] = [exclude] if isinstance(exclude, (nn.Module, Tensor)) else list(exclude)
    found: dict[int, Tensor] = {}
    for item in items:
        if not isinstance(item, (nn.Module, Tensor)):
            raise SettingError(f"LiveBytes(exclude=...) takes modules and tensors, got {type(item).__name__}")
        found |= {id(tensor): tensor for tensor in (item.parameters() if isinstance(item, nn.Module) else (item,))}
    yield from found.values()
