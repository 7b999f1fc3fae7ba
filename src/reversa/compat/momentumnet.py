"""``MomentumNet`` and ``transform_to_momentumnet`` with the arguments of the package momentumnet 0.10.

What that package computes rightly is computed here as well, to rounding: it writes gamma as n / 65536 and the velocity
in float32 where ``use_backprop=False``, here both are what they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from reversa.compat.shifted import Shifted
from reversa.convert.marks import is_switched
from reversa.convert.stage import Place, Stage
from reversa.convert.switch import switch
from reversa.engine import Engine, Invert, Store
from reversa.errors import ConversionError, SettingError, nearest
from reversa.schemes import Dr2Net, Momentum, Scheme
from reversa.sequence import ReversibleSequence

Model = TypeVar("Model", bound=nn.Module)
Names = dict[str, str]

_STAGES = ("layer1", "layer2", "layer3", "layer4")


class MomentumNet(nn.Module):
    r"""A chain of momentum steps over residual functions, as one module.

    .. math:: v' = \gamma v + (1 - \gamma) f(x), \qquad x' = x + v'

    Inverse: :math:`x = x' - v'`, then :math:`v = (v' - (1 - \gamma) f(x)) / \gamma`. Input and output have one shape.

    Unlike the published module it passes keyword arguments on, replays dropout and autocast, moves statistics of
    normalisation layers once, takes any data type and any pattern of frozen parameters, keeps no velocity, and is right
    at any depth. Its parameters are called ``network.blocks.0...`` (there: ``network.0...``), in the same order;
    ``load_state_dict`` takes both.

    Args:
        functions: modules that return a tensor of their input's shape: a list, or a ``Sequential``. Each may take
            further arguments.
        gamma: weight of the old velocity, in [0, 1]; 0 is the plain residual network, of which every state is kept.
        init_speed: whether ``init_function`` gives the first velocity; else it is zero.
        init_function: module that computes the first velocity from the input.
        use_backprop: whether activations are stored (:class:`reversa.Store`) or states computed back
            (:class:`reversa.Invert`). ``net.network.engine`` may be any other engine.
        is_residual: whether ``functions`` are the residual functions; if not, they hold the skip connection themselves,
            and ``f(x) = function(x) - x``.

    Raises:
        SettingError: gamma outside its range, no functions, one of ``init_speed`` and ``init_function`` without the
            other, or both at gamma = 0, where the first velocity has no influence.
        BlockError: (when called) a function changes shape or data type, or writes to its input.

    Source: Sander, Ablin, Blondel, Peyré: Momentum Residual Neural Networks, ICML 2021, arXiv:2102.07870.

    >>> import torch
    >>> f = nn.Sequential(nn.Linear(50, 8), nn.Tanh(), nn.Linear(8, 50))
    >>> net = MomentumNet([f] * 10, gamma=0.99, use_backprop=False)
    >>> net(torch.randn(10, 50)).shape
    torch.Size([10, 50])
    """

    def __init__(
        self,
        functions: Iterable[nn.Module],
        gamma: float,
        init_speed: bool = False,
        init_function: nn.Module | None = None,
        use_backprop: bool = True,
        is_residual: bool = True,
    ) -> None:
        super().__init__()
        scheme = _rule(gamma, _first_velocity(init_speed, init_function), 0 if is_residual else -1)
        self.network = ReversibleSequence(functions, scheme, engine=_engine(use_backprop))
        self.init_speed = init_speed
        names = {f"network.{i}": f"network.blocks.{i}" for i in range(len(self.network.blocks))}
        _take_names(self, names | {"network.init": "network.openers.0"})

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output after the last step; further arguments reach every function, and gradients reach them all."""
        return self.network(x, *args, **kwargs)

    @property
    def gamma(self) -> float:
        """The weight of the old velocity."""
        return getattr(self.network.scheme, "gamma", 0.0)

    @property
    def use_backprop(self) -> bool:
        """Whether activations are stored."""
        return isinstance(self.network.engine, Store)

    @property
    def functions(self) -> list[nn.Module]:
        """The functions in the order of the steps."""
        return self.network.functions

    @property
    def init_function(self) -> nn.Module | None:
        """What computes the first velocity; None where it is zero."""
        return next(iter(self.network.openers), None)


def transform_to_momentumnet(
    model: Model,
    sub_layers: Sequence[str] = _STAGES,
    keep_first_layer: bool = True,
    gamma: float = 0.9,
    use_backprop: bool = False,
    is_residual: bool = False,
    *,
    residual_layers: Sequence[str] | None = None,
) -> Model:
    r"""A copy of a model, in which the blocks of the named layers make momentum steps.

    .. math:: v' = \gamma v + (1 - \gamma) (\mathrm{block}(x) - x), \qquad x' = x + v'

    As in the published package the model itself is not changed. Unlike there, the copy keeps its modules and names:
    ``copy.layer1[2]`` is that block, ``state_dict`` has the model's own keys, and whatever looks into the layers
    (``nn.Transformer``, Hugging Face's models, feature extractors) finds what it looks for. There, ``layer1`` becomes
    ``Sequential(block 0, Sequential(MomentumNet(the others)))``; ``load_state_dict`` takes the names that this gives,
    too. :func:`reversa.explain` and :func:`reversa.restore` work on the copy.

    Args:
        model: a model with ``Sequential`` or ``ModuleList`` modules of blocks that keep the shape.
        sub_layers: paths of those modules.
        keep_first_layer: whether the first block of each stays as it is (it may change the shape).
        gamma: weight of the old velocity, in [0, 1]. The smaller, the nearer to the model; at 0 it is the model.
        use_backprop: whether activations are stored (:class:`reversa.Store`) or states computed back
            (:class:`reversa.Invert`).
        is_residual: whether the blocks are residual functions without a skip connection of their own, so that
            ``block(x)`` stands in place of ``block(x) - x``.
        residual_layers: another name for ``sub_layers``, that of the authors' poster.

    Returns:
        The copy.

    Raises:
        SettingError: unknown paths, paths of other modules, both names for them, or gamma outside its range.
        ConversionError: nothing is left to transform, the model was transformed or converted before, or a block cannot
            be (a ScriptModule, a module that stands in two places).
        BlockError: (when called) a block changes shape or data type, or writes to its input.
        StateChanged: (when called) a block is not given the tensor that the block before it returned.

    Source: Sander, Ablin, Blondel, Peyré: Momentum Residual Neural Networks, ICML 2021, arXiv:2102.07870.

    >>> import torch
    >>> model = nn.Transformer(16, 2, 4, 4, 32, batch_first=True)
    >>> layers = ["encoder.layers", "decoder.layers"]
    >>> net = transform_to_momentumnet(model, sub_layers=layers, gamma=0.9, keep_first_layer=False)
    >>> net(torch.randn(2, 5, 16), torch.randn(2, 4, 16)).shape
    torch.Size([2, 4, 16])
    """
    if not isinstance(model, nn.Module):
        raise SettingError(f"transform_to_momentumnet needs a torch.nn.Module, got {type(model).__name__}")
    scheme, engine = _rule(gamma, None, 1 if is_residual else 0), _engine(use_backprop)
    model = deepcopy(model)
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    children = {name: _children(modules, name) for name in _layers(sub_layers, residual_layers)}
    runs = {name: paths[keep_first_layer:] for name, paths in children.items() if paths[keep_first_layer:]}
    _check_blocks(modules, [path for paths in runs.values() for path in paths])
    stages = {name: Stage(name, scheme, engine, len(paths)) for name, paths in runs.items()}
    switch(model, [[Place(stages[name], i, path, 0) for i, path in enumerate(paths)] for name, paths in runs.items()])
    names: Names = {}
    for name, paths in runs.items():
        within = f"{name}.1.0.network" if keep_first_layer else f"{name}.0.network"
        names |= {f"{within}.{i}": path for i, path in enumerate(paths)}
        names |= {f"{name}.0": path for path in children[name][:keep_first_layer]}
    _take_names(model, names)
    return model


def _rule(gamma: float, init: nn.Module | None, shift: Literal[-1, 0, 1]) -> Scheme:
    if gamma == 0 and init is not None:
        raise SettingError("at gamma = 0 the first velocity has no influence: leave init_function out, or raise gamma")
    scheme = Dr2Net(1, 0) if gamma == 0 else Momentum(gamma, "zero" if init is None else init)
    return Shifted(scheme, shift) if shift and gamma != 1 else scheme  # at 1 no function has any influence


def _engine(use_backprop: bool) -> Engine:
    return Store() if use_backprop else Invert()


def _first_velocity(init_speed: bool, init_function: nn.Module | None) -> nn.Module | None:
    if bool(init_speed) != (init_function is not None):
        raise SettingError(
            f"init_speed=True and a module as init_function belong together, got init_speed={init_speed!r} and "
            f"init_function={init_function!r}. Give both, or neither."
        )
    return init_function


def _layers(sub_layers: Sequence[str], residual_layers: Sequence[str] | None) -> Sequence[str]:
    """The paths that were asked for, under whichever name."""
    if residual_layers is not None and sub_layers is not _STAGES:
        raise SettingError("sub_layers and residual_layers are two names for the same argument: give one of them")
    layers = sub_layers if residual_layers is None else residual_layers
    if isinstance(layers, str) or not layers:
        raise SettingError(f"sub_layers must be a list of paths such as ['layer1', 'encoder.layers'], got {layers!r}")
    return layers


def _children(modules: Mapping[str, nn.Module], name: str) -> list[str]:
    """The paths of a layer's blocks, in their order."""
    if name not in modules:
        known = [
            path for path, module in modules.items() if path and isinstance(module, (nn.Sequential, nn.ModuleList))
        ]
        raise SettingError(nearest(name, known, "layer"))
    layer = modules[name]
    if not isinstance(layer, (nn.Sequential, nn.ModuleList)):
        raise SettingError(f"{name} must be a Sequential or a ModuleList of blocks, it is a {type(layer).__name__}")
    return [f"{name}.{child}" for child, block in layer._modules.items() if block is not None]


def _check_blocks(modules: Mapping[str, nn.Module], paths: Sequence[str]) -> None:
    if any(is_switched(module) for module in modules.values()):
        raise ConversionError("the model is converted already. Call reversa.restore(model) first.")
    if not paths:
        raise ConversionError("no block is left to transform: keep_first_layer=True keeps the first of each layer")
    times = Counter(modules[path] for path in paths)
    for path in paths:
        if times[modules[path]] > 1 or any(path.startswith(f"{other}.") for other in paths):
            raise ConversionError(
                f"{path} would be a step of two chains, or make two steps of one: it stands in two places, or in a "
                "block of another of the layers. Name fewer layers; where one module makes several steps, build "
                "MomentumNet([...])."
            )


def _take_names(module: nn.Module, names: Names) -> None:
    """Let ``load_state_dict`` take the names of the published package."""
    module.register_load_state_dict_pre_hook(partial(_rename, names))


def _rename(names: Names, module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *rest: object) -> None:
    own = module.state_dict(prefix=prefix)
    for key in [key for key in state_dict if key not in own]:
        for theirs, ours in names.items():
            if key.startswith(f"{prefix}{theirs}."):
                state_dict[f"{prefix}{ours}{key.removeprefix(prefix + theirs)}"] = state_dict.pop(key)
                break
