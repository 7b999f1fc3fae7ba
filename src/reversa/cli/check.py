"""``reversa check``."""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reversa import models
from reversa.check import check
from reversa.convert import convert
from reversa.engine import Invert
from reversa.errors import SettingError, import_extra, nearest
from reversa.schemes import SCHEMES
from reversa.train.config import make_scheme

RIGHT, WRONG = 0, 1


def run(arguments: Sequence[str]) -> int:
    """Convert a model of torchvision and check that it trains right; exit status 1 where it does not."""
    settings = _parser().parse_args(arguments)
    for name in ("batch", "image"):
        if getattr(settings, name) < 1:
            raise SettingError(f"--{name} must be at least 1, got {getattr(settings, name)}")
    scheme = make_scheme(settings.scheme, settings.gamma)
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        exact = settings.exact
        model = _model(settings.model)
        images = torch.randn(settings.batch, 3, settings.image, settings.image)
        _try(model, images, settings.model)
        report = check(convert(model, scheme=scheme, exact=exact, engine=Invert(verify=exact)), images)
    print(json.dumps(report.to_dict(), indent=2) if settings.json else report)
    return RIGHT if report.ok else WRONG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reversa check",
        description="Convert a model and compare its training with stored activations: gradients, drift, side effects. "
        "Exit status 1 where training would be wrong.",
    )
    parser.add_argument("model", metavar="MODEL", help="a classification model of torchvision, for instance resnet50")
    parser.add_argument("--batch", type=int, default=2, help="images in the batch (default: 2)")
    parser.add_argument("--image", type=int, default=64, help="height and width in pixels (default: 64)")
    parser.add_argument("--scheme", default="momentum", help=f"one of {', '.join(SCHEMES)} (default: momentum)")
    parser.add_argument("--gamma", type=float, help="weight of the old velocity (default: the scheme's own)")
    parser.add_argument("--exact", action="store_true", help="exact arithmetic, proved bit for bit on the way back")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the images (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the report for a program")
    return parser


def _model(name: str) -> nn.Module:
    """A model of torchvision with fresh weights.

    Raises:
        SettingError: torchvision has no such model; the message lists the nearest ones.
    """
    name = name.removeprefix("torchvision:")
    torchvision = import_extra("torchvision.models", "vision")
    known = torchvision.list_models(module=torchvision)
    if name not in known:
        if name in models.MODELS:
            raise SettingError(
                f"reversa check converts models of torchvision, and {name} is one of Reversa's own, which need no "
                f"conversion: in Python, reversa.check(reversa.models.create({name!r}), images)"
            )
        raise SettingError(nearest(name, known, "torchvision model"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of models whose first weights will be other ones some day
        return torchvision.get_model(name, weights=None)


def _try(model: nn.Module, images: Tensor, name: str) -> None:
    """Find out whether the model takes such images, before anything is said about its training.

    Raises:
        SettingError: it does not; the message has the model's own words.
    """
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval()(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = images.shape[2:]
        raise SettingError(
            f"{name} does not take images of {height} x {width} pixels: {str(error).rstrip('.!')}. Choose "
            "another --image, for instance 224."
        ) from error
