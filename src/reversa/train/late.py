"""Classes that are derived from another package's, which is not loaded before one is made."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from reversa.errors import import_extra


class LateBase:
    """Makes every object one of its class and of :attr:`base`."""

    base: ClassVar[tuple[str, str, str]]
    """Module, name and extra of the other package's class."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        module, name, extra = cls.base
        bases = cls, getattr(import_extra(module, extra), name)
        return object.__new__(type(cls.__name__, bases, {"__module__": cls.__module__, "__doc__": cls.__doc__}))

    def __reduce__(self) -> tuple[Any, ...]:  # a process that is spawned is sent its callbacks
        return type(self).__new__, (type(self).__mro__[1],), vars(self)
