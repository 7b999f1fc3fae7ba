"""Models of text as the command line calls them: token ids or embeddings in, and the model's own loss."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from reversa.check.step import default_loss
from reversa.convert.example import example_inputs
from reversa.errors import ConversionError, SettingError

IDS = "input_ids"
LONGEST, IMAGES = 1024, 8
POSITIONS = "wpe", "position_embedding", "position_embeddings", "embed_positions"
"""What Hugging Face's models call a table of learned positions."""


def takes_ids(model: nn.Module) -> bool:
    """Whether a model takes token ids: it says so, or its first parameters are those of an embedding.

    >>> takes_ids(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))), takes_ids(nn.Linear(4, 10))
    (True, False)
    """
    if (name := _main_input(model)) is not None:
        return name == IDS
    first = next((module for module in model.modules() if [*module.parameters(recurse=False)]), None)
    return isinstance(first, nn.Embedding)


def arguments(model: nn.Module, shape: tuple[int, ...], spec: str) -> Any:
    """What a model is called with, for a shape: a shape, a tensor of token ids, or keyword arguments.

    Raises:
        SettingError: the shape is neither that of token ids nor that of embeddings, or longer than the model's table of
            positions, which fake tensors would not notice.
    """
    name = _main_input(model)
    if name is None:
        return _tokens(model, shape) if len(shape) == 2 and takes_ids(model) else shape
    if name != IDS:
        return {name: shape}
    if len(shape) not in (2, 3):
        raise SettingError(
            f"{spec} takes --input BATCHxLENGTH of token ids, or BATCHxLENGTHxWIDTH of embeddings; "
            f"got {'x'.join(map(str, shape))}"
        )
    _check_room(model, shape[1], spec)
    given: dict[str, Any] = {IDS: _tokens(model, shape)} if len(shape) == 2 else {"inputs_embeds": shape}
    known = inspect.signature(model.forward).parameters
    if "labels" in known and _has_scores(model):
        given["labels"] = _tokens(model, shape[:2])
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = _tokens(model, shape[:2])
    if "use_cache" in known:
        given["use_cache"] = False  # it is for generating text, and training switches it off
    return given


def default_shape(model: nn.Module) -> tuple[int, ...] | None:
    """A model's own inputs: one sequence as long as it takes, 1024 tokens at most; or eight images."""
    name = _main_input(model)
    if name == IDS:
        lengths = LONGEST, getattr(model.config, "max_position_embeddings", None), most_tokens(model)
        return 1, min(length for length in lengths if length)
    try:
        example = example_inputs(model)
    except ConversionError:
        return None
    return (IMAGES, *example[1][name].shape[1:]) if example and name else None


def own_loss(output: Any) -> Tensor:
    """The loss that a model returns, where it returns one; else that of :func:`reversa.check`."""
    own = getattr(output, "loss", None)
    return default_loss(output) if own is None else own


def _main_input(model: nn.Module) -> str | None:
    name = getattr(model, "main_input_name", None)
    return name if isinstance(name, str) else None


def _has_scores(model: Any) -> bool:
    """Whether the model ends in scores of every token of its vocabulary: then its labels are token ids."""
    return hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def _tokens(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.zeros(shape, dtype=torch.long, device=device)


def _check_room(model: nn.Module, length: int, spec: str) -> None:
    room = most_tokens(model)
    if room is not None and length > room:
        raise SettingError(
            f"{spec} has learned positions for {room} tokens, got a length of {length}: choose at most {room}"
        )


def most_tokens(model: nn.Module) -> int | None:
    """The most tokens that there are learned positions for; None where positions are not learned."""
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITIONS
    ]
    return min(map(_positions, tables), default=None)


def _positions(table: nn.Embedding) -> int:
    """The rows of a table, but for those in front that no token uses: RoBERTa's, and OPT's and BART's."""
    unused = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - unused
