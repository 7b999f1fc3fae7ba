"""Networks built from reversible sequences, and the one table of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from reversa.errors import SettingError, nearest
from reversa.models.flow import NICE
from reversa.models.hamiltonian import HamiltonianNet, LeapfrogNet, MidpointNet
from reversa.models.heun import HeunNet, HeunSequence
from reversa.models.iresnet import IResNet
from reversa.models.irevnet import IRevNet
from reversa.models.lista import Lista
from reversa.models.momentum import MomentumResNet
from reversa.models.ode import Autonomous, NeuralODE, SecondOrderODE
from reversa.models.odenet import ODENet, ODEResNet
from reversa.models.resnet import ResNet
from reversa.models.revnet import RevNet
from reversa.models.simple import SimpleHamiltonianNet
from reversa.models.small import ReversibleResNet
from reversa.models.transformer import Transformer, TransformerLM
from reversa.models.vit import VisionTransformer

_DEEP = (32, 32, 64, 128)
_IMAGENET: dict[str, Any] = {"narrows": True, "large": True}
_RESNET = _IMAGENET | {"widths": (64, 64, 128, 256, 512)}
_REVNET = _IMAGENET | {"widths": (128, 128, 256, 512, 832)}
_VIT_S: dict[str, Any] = {"patch": 16, "width": 384, "depth": 12, "heads": 6}
_VIT_B: dict[str, Any] = {"patch": 16, "width": 768, "depth": 12, "heads": 12}
# For 96 x 96 pixels: the channels and blocks of Ruthotto and Haber's runSTL10.m, whose h is 1.
_STL10: dict[str, Any] = {"widths": (16, 16, 32, 64, 128), "blocks": (5, 5, 5, 5)}

# Read by the tests, the docs and the command line: a new network is one file and one line here.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "reversibleresnet": ReversibleResNet,
    "resnet32": ResNet,
    "resnet110": partial(ResNet, blocks=(18, 18, 18)),
    "resnet164": partial(ResNet, blocks=(18, 18, 18), narrows=True),
    "resnet1202": partial(ResNet, blocks=(200, 200, 200)),
    "resnet50": partial(ResNet, blocks=(3, 4, 6, 3), **_RESNET),
    "resnet101": partial(ResNet, blocks=(3, 4, 23, 3), **_RESNET),
    "revnet38": RevNet,
    "revnet110": partial(RevNet, widths=_DEEP, blocks=(9, 9, 9)),
    "revnet164": partial(RevNet, widths=_DEEP, blocks=(9, 9, 9), narrows=True),
    "revnet56": partial(RevNet, blocks=(2, 2, 3, 2), **_REVNET),
    "revnet104": partial(RevNet, blocks=(2, 2, 11, 2), **_REVNET),
    "hamiltonian74": HamiltonianNet,
    "hamiltonian218": partial(HamiltonianNet, widths=_DEEP, blocks=(18, 18, 18)),
    "hamiltonian1202": partial(HamiltonianNet, widths=_DEEP, blocks=(100, 100, 100), between="batchnorm"),
    "midpoint26": MidpointNet,
    "midpoint62": partial(MidpointNet, widths=_DEEP, blocks=(10, 10, 10)),
    "leapfrog26": LeapfrogNet,
    "leapfrog62": partial(LeapfrogNet, widths=_DEEP, blocks=(10, 10, 10)),
    "hamiltonianstl10": partial(HamiltonianNet, **_STL10),
    "midpointstl10": partial(MidpointNet, **_STL10),
    "leapfrogstl10": partial(LeapfrogNet, **_STL10),
    "simplehamiltonian218": SimpleHamiltonianNet,
    "simplehamiltonian218regularised": partial(SimpleHamiltonianNet, regularised=True),
    "simplehamiltonian218inception": partial(SimpleHamiltonianNet, regularised=True, inception=True),
    "irevnet163": IRevNet,
    "irevnet301": partial(IRevNet, widths=None, blocks=(6, 16, 72, 6), strides=(2, 2, 2, 2), squeeze=2, dropout=0.0),
    "iresnet64": IResNet,
    "momentumresnet18": MomentumResNet,
    "momentumresnet34": partial(MomentumResNet, blocks=(3, 4, 6, 3)),
    "momentumresnet50": partial(MomentumResNet, blocks=(3, 4, 6, 3), narrows=True),
    "momentumresnet101": partial(MomentumResNet, blocks=(3, 4, 23, 3), narrows=True),
    "momentumresnet152": partial(MomentumResNet, blocks=(3, 8, 36, 3), narrows=True),
    "odenet": ODENet,
    "odenetsmall": partial(ODENet, halvings=1),
    "odenetresnet": ODEResNet,
    "odenetresnetsmall": partial(ODEResNet, halvings=1),
    "heunnet32": HeunNet,
    "vit": VisionTransformer,
    "vits16": partial(VisionTransformer, **_VIT_S),
    "vitb16": partial(VisionTransformer, **_VIT_B),
    "revvit": partial(VisionTransformer, trunk="revnet"),
    "revvits16": partial(VisionTransformer, **_VIT_S, trunk="revnet"),
    "revvitb16": partial(VisionTransformer, **_VIT_B, trunk="revnet"),
    "momentumvit": partial(VisionTransformer, trunk="momentum", gamma=0.9),
}


def names() -> list[str]:
    """The names that :func:`create` knows.

    >>> "reversibleresnet" in names()
    True
    """
    return sorted(MODELS)


def settings_of(name: str) -> dict[str, Any]:
    """The settings of a network by name, with their defaults.

    Raises:
        SettingError: no network has that name; the message lists the nearest ones.

    >>> settings_of("hamiltonian218")["h"]
    0.1
    """
    if name not in MODELS:
        raise SettingError(nearest(name, names(), "model"))
    parameters = inspect.signature(MODELS[name]).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "num_classes"}


def create(name: str, num_classes: int = 10, **settings: Any) -> nn.Module:
    """A network by name, with fresh parameters.

    Args:
        name: one of :func:`names`.
        num_classes: width of the output layer.
        settings: the network's own settings, for instance ``depth=54``.

    Raises:
        SettingError: no network has that name, or it has no such setting; the message lists the nearest ones.

    >>> net = create("reversibleresnet", num_classes=10, depth=6, width=8)
    >>> len(net.chains)
    3
    """
    known = settings_of(name)
    for setting in settings:
        if setting not in known:
            raise SettingError(nearest(setting, known, f"setting of {name}"))
    return MODELS[name](num_classes=num_classes, **settings)


__all__ = [
    "MODELS",
    "NICE",
    "Autonomous",
    "HamiltonianNet",
    "HeunNet",
    "HeunSequence",
    "IResNet",
    "IRevNet",
    "LeapfrogNet",
    "Lista",
    "MidpointNet",
    "MomentumResNet",
    "NeuralODE",
    "ODENet",
    "ODEResNet",
    "ResNet",
    "RevNet",
    "ReversibleResNet",
    "SecondOrderODE",
    "SimpleHamiltonianNet",
    "Transformer",
    "TransformerLM",
    "VisionTransformer",
    "create",
    "names",
    "settings_of",
]
