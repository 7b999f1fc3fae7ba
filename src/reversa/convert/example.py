"""Inputs to find the stages with: the user's, or those that the model itself tells. Only shapes and types matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reversa.convert.find import Findings, FoundStage, is_composite, stage_names
from reversa.errors import ConversionError, SettingError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def example_inputs(model: nn.Module, example: Any = None) -> Inputs | None:
    """Positional and keyword arguments for one forward pass of the model.

    Args:
        model: where no example is given, torchvision's, timm's, Hugging Face's and ``torch.nn``'s models are known by
            their class and their own settings.
        example: a tensor, a tuple of positional arguments, or a dictionary of keyword arguments.

    Returns:
        The arguments; None where nothing tells them, but :func:`same_class_runs` sees stages without any.

    Raises:
        SettingError: the example is something else.
        ConversionError: no example was given, nothing tells the inputs, and no stage can be seen without them.

    >>> args, kwargs = example_inputs(nn.TransformerEncoderLayer(16, 2, batch_first=True))
    >>> args[0].shape, kwargs
    (torch.Size([2, 5, 16]), {})
    """
    if example is not None:
        return _given(example)
    for known in (_torch_nn, _torchvision, _timm, _hugging_face):
        inputs = known(model)
        if inputs is not None:
            return inputs
    if same_class_runs(model).stages:
        return None
    raise ConversionError(
        f"Finding the stages needs one forward pass, and nothing tells which inputs {type(model).__name__} takes. Pass "
        "example=: a tensor, a tuple of arguments or a dictionary of keyword arguments. Only shapes and types count."
    )


def same_class_runs(model: nn.Module) -> Findings:
    """Stages guessed from the structure alone: neighbours in a list of one class, with parameters of the same shapes.

    Without a forward pass nobody knows whether blocks keep the shape and add to their input: the first real call tells.

    >>> layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 3)
    >>> [(stage.name, len(stage.blocks), stage.shape) for stage in same_class_runs(layers).stages]
    [('layers', 3, None)]
    """
    runs: list[list[str]] = []
    for path, parent in model.named_modules():
        if isinstance(parent, (nn.ModuleList, nn.Sequential)) and not _is_inside(path, runs):
            runs += [run for run in _alike(path, parent) if len(run) > 1]
    names = stage_names(runs)
    return Findings(tuple(FoundStage(name, tuple(run)) for name, run in zip(names, runs, strict=True)), ())


def _alike(path: str, parent: nn.Module) -> Iterator[list[str]]:
    """The children's paths, gathered into runs that are built alike; modules that are no blocks end a run."""
    run: list[str] = []
    last: Any = None
    seen: set[nn.Module] = set()
    for name, child in parent._modules.items():  # named_children() would leave out the repetitions
        block = child is not None and child not in seen and _is_block(child)
        build = (type(child), [p.shape for p in child.parameters()]) if child is not None and block else None
        if build is None or build != last:
            yield run
            run = []
        if build is not None and child is not None:
            run.append(f"{path}.{name}" if path else name)
            seen.add(child)
        last = build
    yield run


def _is_block(module: nn.Module) -> bool:
    own = any(True for _ in module.parameters(recurse=False)) and not type(module).__module__.startswith("torch.")
    return own or is_composite(module)


def _is_inside(path: str, runs: list[list[str]]) -> bool:
    return any(path == block or path.startswith(f"{block}.") for run in runs for block in run)


def _given(example: Any) -> Inputs:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple):
        return tuple(example), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    raise SettingError(
        f"example must be a tensor, a tuple of positional arguments or a dictionary of keyword arguments, got "
        f"{type(example).__name__}. For one argument that is itself a list or a tuple, pass example=(argument,)."
    )


def _zeros(model: nn.Module, *shape: int) -> Tensor:
    """Zeros of the model's own data type, on its device."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    return torch.zeros(shape, dtype=None if like is None else like.dtype, device=None if like is None else like.device)


def _comes_from(model: nn.Module, package: str) -> bool:
    """Whether the model's class, or one that it is derived from, is the package's."""
    return any(cls.__module__.startswith(f"{package}.") for cls in type(model).__mro__)


def _torch_nn(model: nn.Module) -> Inputs | None:
    """``torch.nn.Transformer`` and its parts: sequences of different lengths, so that none passes for another."""
    kinds = (
        (nn.Transformer, 2),
        (nn.TransformerEncoder, 1),
        (nn.TransformerEncoderLayer, 1),
        (nn.TransformerDecoder, 2),
        (nn.TransformerDecoderLayer, 2),
    )
    count = next((count for kind, count in kinds if isinstance(model, kind)), 0)
    attention = next((m for m in model.modules() if isinstance(m, nn.MultiheadAttention)), None)
    if not count or attention is None:
        return None
    sizes = [(2, length) if attention.batch_first else (length, 2) for length in (5, 4)]
    return tuple(_zeros(model, *size, attention.embed_dim) for size in sizes[:count]), {}


def _torchvision(model: nn.Module) -> Inputs | None:
    """Classification, segmentation and video models of torchvision."""
    if not _comes_from(model, "torchvision.models") or _comes_from(model, "torchvision.models.detection"):
        return None
    if _comes_from(model, "torchvision.models.video"):
        return (_zeros(model, 2, 3, 16, 224, 224),), {}
    side = getattr(model, "image_size", 224)
    return (_zeros(model, 2, 3, side, side),), {}


def _timm(model: nn.Module) -> Inputs | None:
    """Models of timm carry the size of their pretrained weights, and those with patches the size of their own."""
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = settings.get("input_size") if isinstance(settings, Mapping) else None
    if size is None:
        return None
    channels, *sides = size
    patches = getattr(model, "patch_embed", None)
    own = getattr(patches, "img_size", None)
    if isinstance(own, (tuple, list)) and len(own) == 2:
        channels, sides = getattr(getattr(patches, "proj", None), "in_channels", channels), list(own)
    return (_zeros(model, 2, channels, *sides),), {}


def _hugging_face(model: nn.Module) -> Inputs | None:
    """Models of Hugging Face say what their main input is, and their configuration says its size."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        return None
    makers: dict[str, Callable[[nn.Module, Any], Tensor | None]] = {
        "pixel_values": _pixels,
        "input_features": _features,
        "input_ids": _tokens,
    }
    made = makers[main](model, config) if main in makers else None
    if made is None:
        return None
    kwargs: dict[str, Any] = {main: made}
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = torch.zeros(2, 6, dtype=torch.long, device=made.device)
    if hasattr(config, "use_cache"):
        kwargs["use_cache"] = False
    return (), kwargs


def _pixels(model: nn.Module, config: Any) -> Tensor:
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return _zeros(model, 2, getattr(config, "num_channels", 3), height, width)


def _features(model: nn.Module, config: Any) -> Tensor | None:
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    return None if bins is None or frames is None else _zeros(model, 2, bins, 2 * frames)


def _tokens(model: nn.Module, config: Any) -> Tensor:
    return torch.zeros(2, 8, dtype=torch.long, device=_zeros(model).device)
