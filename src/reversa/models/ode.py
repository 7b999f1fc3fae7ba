"""Networks of infinitely many layers: neural ODEs, and the second-order limit of Momentum ResNets."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from reversa.errors import BlockError, SettingError, StateError, import_extra, nearest

# Shapes in this file: a state z (or x) has any shape.

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
"""torchdiffeq's names, kept here so that a network can be built, counted and listed where it is not installed."""


class NeuralODE(nn.Module):
    r"""A residual network of infinitely many layers: the flow of an ordinary differential equation.

    .. math:: \dot z = f(t, z), \quad 0 \le t \le T; \qquad z(0) \mapsto z(T)

    Inverse: the same equation from T back to 0, exact but for the solver's error. With the adjoint method the backward
    pass solves, together with z and from T back to 0,

    .. math:: \dot a = -a^\top \partial_z f, \qquad \frac{dL}{d\theta} = -\int_T^0 a^\top \partial_\theta f \, dt,
        \qquad a(T) = \frac{dL}{dz(T)},

    so that memory does not grow with the number of evaluations; its gradients are as good as the tolerances.

    f is a function of t and z alone: no dropout, and statistics of BatchNorm would move with every evaluation. It runs
    in the data type of z, under autocast too: a solver cannot hold an error of 1e-3 in numbers of 8 bits. Gradients
    reach z and the parameters of f; with the adjoint method no other tensor that f uses.

    Args:
        f: a module of ``(t, z)`` that returns a tensor like z. :class:`Autonomous` makes one of a residual function.
        time: T.
        method: a solver of torchdiffeq. It chooses its own steps (``"dopri5"``, ``"dopri8"``, ``"bosh3"``,
            ``"fehlberg2"``, ``"adaptive_heun"``) or takes equal ones (``"euler"``, ``"midpoint"``, ``"heun2"``,
            ``"heun3"``, ``"rk4"``, ``"explicit_adams"``, ``"implicit_adams"``).
        rtol: error of a step relative to z, for methods that choose their steps.
        atol: error of a step beside that.
        adjoint: gradients by the adjoint method; False for those of the solver's own steps, whose activations are
            stored.
        steps: how many equal steps; for methods that take them.

    Raises:
        SettingError: an unknown method, or a number outside its range.
        BlockError: (when called) f returns another shape or data type.
        StateError: (when called) the solver cannot hold its tolerances: f is too steep, or not finite. In the backward
            pass of the adjoint method it is torchdiffeq's AssertionError.
        MissingExtra: (when called) torchdiffeq is not installed.

    Source: Chen, Rubanova, Bettencourt, Duvenaud: Neural Ordinary Differential Equations, NeurIPS 2018,
    arXiv:1806.07366; solvers: torchdiffeq.

    >>> ode = NeuralODE(Autonomous(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))), method="rk4", steps=5)
    >>> z = torch.randn(2, 3)
    >>> torch.allclose(ode.inverse(ode(z)), z, atol=1e-3)
    True
    >>> ode.evaluations
    20
    """

    evaluations: int
    """Evaluations of f in the last call, forward or inverse; those of its backward pass are not among them."""

    def __init__(
        self,
        f: nn.Module,
        time: float = 1.0,
        method: str = "dopri5",
        rtol: float = 1e-3,
        atol: float = 1e-3,
        adjoint: bool = True,
        steps: int | None = None,
    ) -> None:
        super().__init__()
        _check_function(f)
        _check_positive(time=time, rtol=rtol, atol=atol)
        _check_method(method, steps)
        self.f = f
        self.time, self.method, self.rtol, self.atol, self.steps = time, method, rtol, atol, steps
        self.adjoint = adjoint
        self.evaluations = 0

    def forward(self, z: Tensor) -> Tensor:
        """z(T) of z(0), of the same shape."""
        return self._between(z, 0.0, self.time)

    def inverse(self, z: Tensor) -> Tensor:
        """z(0) of z(T), of the same shape."""
        return self._between(z, self.time, 0.0)

    def extra_repr(self) -> str:
        """The interval and the solver."""
        how = f"rtol={self.rtol}, atol={self.atol}" if self.steps is None else f"steps={self.steps}"
        return f"time={self.time}, method={self.method!r}, {how}, adjoint={self.adjoint}"

    def _between(self, z: Tensor, start: float, end: float) -> Tensor:
        if torch.is_autocast_enabled(z.device.type) and z.dtype != torch.float64:
            z = z.float()
        field = _Field(self.f)
        times = torch.tensor([start, end], dtype=z.dtype, device=z.device)
        path = self._solve(field, z, times)
        self.evaluations = field.evaluations
        return path[-1]

    def _solve(self, field: _Field, z: Tensor, times: Tensor) -> Tensor:
        with unset_fake_temporarily(), torch.device("cpu"):  # a first import makes tensors, which stay
            solvers = import_extra("torchdiffeq", "ode")
        settings: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol, "method": self.method}
        if self.steps is not None:
            # Not torchdiffeq's step_size, which rounding may give one step more.
            settings["options"] = {"grid_constructor": partial(_equal_steps, self.steps)}
        try:
            if not self.adjoint:
                return solvers.odeint(field, z, times, **settings)
            return solvers.odeint_adjoint(field, z, times, **settings, adjoint_params=tuple(self.f.parameters()))
        except AssertionError as error:  # what torchdiffeq raises where it cannot go on
            reason = str(error).partition("\n")[0]
            raise StateError(
                f"{self.method} gave up after {field.evaluations} evaluations of f: {reason}. It needs a state that is "
                f"finite and an f not too steep for rtol={self.rtol}, atol={self.atol}: lower the learning rate, allow "
                "larger tolerances, or take equal steps, for instance method='rk4', steps=20."
            ) from error


class Autonomous(nn.Module):
    """A residual function ``f(z)`` as a function ``f(t, z)`` that does not look at the time.

    >>> Autonomous(nn.Identity())(torch.tensor(0.5), torch.ones(2))
    tensor([1., 1.])
    """

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.f(z)


class SecondOrderODE(nn.Module):
    r"""What a Momentum ResNet becomes as its depth grows.

    .. math:: \varepsilon \ddot x + \dot x = f(t, x), \quad 0 \le t \le T, \qquad (x, \dot x)(0) = (x_0, v_0)

    Inverse: the same equation from T back to 0. Unlike those of a first-order equation, trajectories of x may cross.

    From layers to the equation: with :math:`w = \dot x`, a step size :math:`h = T / N`, w stepped by
    :math:`w' = w + \tfrac{h}{\varepsilon} (f(x) - w)`, and then :math:`x' = x + h w'`, the scaled velocity
    :math:`v = h w` obeys

    .. math:: v' = \gamma v + (1 - \gamma)\, h f(x), \quad x' = x + v', \qquad
        \gamma = 1 - \frac{h}{\varepsilon} = 1 - \frac{T}{N \varepsilon},

    which are N steps of :class:`reversa.Momentum` with the residual functions :math:`h f` and the first velocity
    :math:`h v_0`, for any :math:`N > T / \varepsilon`. The method is of first order, so the difference halves as N
    doubles. (Where a layer takes the time h = 1, this is the paper's :math:`\varepsilon = 1 / (1 - \gamma)`.)

    Args:
        f: a module of ``(t, x)`` that returns a tensor like x. :class:`Autonomous` makes one of a residual function.
        epsilon: weight of the acceleration, above 0; towards 0 it is the first-order equation, and stiff.
        time: T.
        init: the first velocity: ``"zero"``, or a module that computes it from the input, ``v0 = init(x0)``.
        solver: settings of :class:`NeuralODE`: ``method``, ``rtol``, ``atol``, ``adjoint``, ``steps``.

    Raises:
        SettingError: an init that is neither ``"zero"`` nor a module; otherwise as :class:`NeuralODE`.
        StateError: (when called) init makes a velocity unlike x; otherwise as :class:`NeuralODE`.

    Source: Sander, Ablin, Blondel, Peyré: Momentum Residual Neural Networks, ICML 2021, arXiv:2102.07870.

    >>> ode = SecondOrderODE(Autonomous(nn.Linear(3, 3)), epsilon=0.5)
    >>> ode(torch.randn(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        f: nn.Module,
        epsilon: float,
        time: float = 1.0,
        init: Literal["zero"] | nn.Module = "zero",
        **solver: Any,
    ) -> None:
        super().__init__()
        if not (init == "zero" or isinstance(init, nn.Module)):
            raise SettingError(f"init must be 'zero' or a module that computes v0 from x0, got {init!r}")
        self.ode = NeuralODE(_SecondOrder(f, epsilon), time, **solver)
        self.init = init

    @property
    def evaluations(self) -> int:
        """Evaluations of f in the last call."""
        return self.ode.evaluations

    def forward(self, x: Tensor) -> Tensor:
        """x(T) of x(0), of the same shape."""
        v = self.init(x) if isinstance(self.init, nn.Module) else torch.zeros_like(x)
        return self.forward_state((x, v))[0]

    def forward_state(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(x, v)(T) of (x, v)(0), where v is the derivative of x."""
        x, v = self.ode(_stacked(state))
        return x, v

    def inverse_state(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(x, v)(0) of (x, v)(T)."""
        x, v = self.ode.inverse(_stacked(state))
        return x, v


class _SecondOrder(nn.Module):
    """The first-order equation of (x, v), which are stacked."""

    def __init__(self, f: nn.Module, epsilon: float) -> None:
        super().__init__()
        _check_function(f)
        _check_positive(epsilon=epsilon)
        self.f, self.epsilon = f, epsilon

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        x, v = state
        return torch.stack((v, (_like(self.f(t, x), x) - v) / self.epsilon))


class _Field:
    """f as a solver sees it: counted, checked, and at the state's precision."""

    def __init__(self, f: nn.Module) -> None:
        self.f = f
        self.evaluations = 0

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        self.evaluations += 1
        with torch.autocast(z.device.type, enabled=False):
            return _like(self.f(t, z), z)


def _equal_steps(steps: int, field: Any, z: Tensor, times: Tensor) -> Tensor:
    return torch.linspace(float(times[0]), float(times[-1]), steps + 1, dtype=times.dtype, device=times.device)


def _stacked(state: tuple[Tensor, Tensor]) -> Tensor:
    x, v = state
    if x.shape != v.shape or x.dtype != v.dtype:
        raise StateError(
            f"the velocity must be like x, {tuple(x.shape)} {x.dtype}; it is {tuple(v.shape)} {v.dtype}. "
            "Change the last layer of init, or the state that was given."
        )
    return torch.stack((x, v))


def _like(value: Any, z: Tensor) -> Tensor:
    """The value of f; a solver would broadcast one of another shape without a word."""
    if not isinstance(value, Tensor) or value.shape != z.shape or value.dtype != z.dtype:
        came = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
        raise BlockError(
            f"f must return the derivative of a state of shape {tuple(z.shape)} {z.dtype}, a tensor like it; it "
            f"returned {came}. Change its last layer, or convert the module or its input."
        )
    return value


def _check_function(f: nn.Module) -> None:
    if not isinstance(f, nn.Module):
        raise SettingError(f"f must be a module of (t, z), got {f!r}. Wrap a plain function in a module.")
    try:
        inspect.signature(f.forward).bind(None, None)
    except TypeError as error:
        raise SettingError(
            f"f is called with the time and the state, f(t, z), and {type(f).__name__} does not take both ({error}). "
            "For a residual function of the state alone give Autonomous(f)."
        ) from error


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (isinstance(number, (int, float)) and 0 < number < math.inf):
            raise SettingError(f"{name} must be a positive number, got {number!r}")


def _check_method(method: str, steps: int | None) -> None:
    if method not in ADAPTIVE + FIXED:
        raise SettingError(nearest(method, ADAPTIVE + FIXED, "method"))
    if method in ADAPTIVE and steps is not None:
        raise SettingError(
            f"{method} chooses its own steps, got steps={steps}: leave steps out and give rtol and atol, or take a "
            f"method of equal steps: {', '.join(FIXED)}"
        )
    if method in FIXED and not (isinstance(steps, int) and steps >= 1):
        raise SettingError(f"{method} takes equal steps: say how many, for instance steps=20; got {steps!r}")
