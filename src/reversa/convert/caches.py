"""Key-value caches among a block's arguments, and checkpointing around it: what a reversible stage does without.

A block that is evaluated twice would fill a cache twice. A cache is told by what it does: it has ``update`` and
``get_seq_length``, as those of ``transformers``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from reversa.convert.stage import Stage
from reversa.engine.steps import is_recording
from reversa.errors import StateChanged

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Arguments(NamedTuple):
    """What a block is called with beside the carried tensor."""

    args: Args
    kwargs: Kwargs
    once: bool
    """The block writes to a cache among them: its step can be made once, and autograd has to store it."""


def is_cache(value: Any) -> bool:
    """Whether an argument is a key-value cache.

    >>> is_cache({}), is_cache(None)
    (False, False)
    """
    return hasattr(value, "update") and hasattr(value, "get_seq_length") and not isinstance(value, type)


def without_caches(block: nn.Module, stage: Stage, args: Args, kwargs: Kwargs) -> Arguments:
    """The arguments as a step of the stage can take them.

    Nothing changes where no gradient is recorded (a model that writes text) or nothing is evaluated twice. In training
    an empty cache is taken out, as checkpointing does it: nobody reads it. One with keys in it (of a prefix, of a call
    before), one that was allocated beforehand and every cache in evaluation mode stay.
    """
    caches = [value for value in (*args, *kwargs.values()) if is_cache(value)]
    if not caches or stage.stores or not is_recording():
        return Arguments(args, kwargs, once=False)
    layer = _layer_of(block)
    if not block.training or any(_is_in_use(cache, layer) for cache in caches):
        return Arguments(args, kwargs, once=True)
    for cache in caches:
        _refuse_again(cache, block, stage)
    stage.tell(
        f"the key-value cache does not reach the blocks of stage {stage.name!r} in training, and stays empty: the "
        "backward pass evaluates them again, which would fill it twice. Pass use_cache=False (or set config.use_cache) "
        "to say that you want none; to decode with a cache, call model.eval() or use torch.no_grad()."
    )
    return Arguments(*stripped(args, kwargs), once=False)


def _refuse_again(cache: Any, block: nn.Module, stage: Stage) -> None:
    """Raise where a cache comes back that was left empty: who wrote the loop counts on what should be in it."""
    given = stage.withheld_from(cache)
    if id(block) in given:
        raise StateChanged(
            f"the key-value cache of a call before came back to stage {stage.name!r}, empty: in training the blocks "
            "are given none, so this call would not see what the other was given. Make one call of the whole "
            "sequence with use_cache=False, use model.eval(), or convert with engine=reversa.Store()."
        )
    given.add(id(block))


def stripped(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """The arguments of a call without caches.

    >>> stripped((1,), {"use_cache": True})
    ((1,), {'use_cache': False})
    """
    return tuple(_without(value) for value in args), {name: _without(value, name) for name, value in kwargs.items()}


def _without(value: Any, name: str = "") -> Any:
    return None if is_cache(value) else False if name == "use_cache" else value


def tell_of_checkpointing(block: nn.Module, stage: Stage) -> None:
    """Say that ``gradient_checkpointing_enable()`` does nothing here: its wrapper is not the outermost ``forward``."""
    if getattr(block, "gradient_checkpointing", False) and block.training and is_recording():
        stage.tell(
            f"gradient checkpointing has no effect on the blocks of stage {stage.name!r}, which need none: "
            f"{stage.engine} decides what is kept for the backward pass. Switch it off with the model's "
            "gradient_checkpointing_disable() (activation_checkpointing_disable() in newer versions); modules outside "
            "may keep it."
        )


def _layer_of(block: nn.Module) -> int:
    """The number under which the block's attention writes to the cache."""
    numbers = (getattr(module, "layer_idx", None) for module in block.modules())
    return next((number for number in numbers if isinstance(number, int)), 0)


def _is_in_use(cache: Any, layer: int) -> bool:
    """Whether a cache keeps something for that layer, or masks are made for more keys than a call brings."""
    parts = [
        part for part in getattr(cache, "__dict__", {}).values() if is_cache(part)
    ]  # of a decoder: its own, and the encoder's
    if parts:
        return any(_is_in_use(part, layer) for part in parts)
    masked = _asked(cache, "get_mask_sizes", 1, layer)  # a single query, for which an allocated cache has all its keys
    lengths = _asked(cache, "get_seq_length", layer), _asked(cache, "has_previous_state", layer)
    return any(map(bool, lengths)) or (masked is not None and masked[0] != 1)


def _asked(cache: Any, method: str, *args: int) -> Any:
    """What a cache answers; None where it cannot: attention has keys, recurrent layers have a state."""
    try:
        return getattr(cache, method)(*args)
    except (AttributeError, ValueError):
        return None
