"""Import one file of a checkout whose dependencies may be missing."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

from torch import nn


class _Anything:
    """Any name of a package that is not installed: a decorator, a base class, a registry."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and isinstance(args[0], type | types.FunctionType) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type[Any], ...]:
        return (_Base,)


class _Base(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


class _Stub(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Missing:
    """Finds packages that are not installed, for the checkout alone, and gives stubs."""

    def __init__(self, repo: Path) -> None:
        self.repo = repo

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        frame = sys._getframe(1)
        while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if not _is_in(self.repo, frame.f_globals.get("__file__")):
            return None  # an installed package looks for what it can do without
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Lenient:
    """Finds the checkout's packages; one that raises is an empty package."""

    def __init__(self, repo: Path) -> None:
        self.repo = repo
        self.loaders: dict[str, Any] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or not _is_in(self.repo, spec.origin) or not spec.submodule_search_locations:
            return None
        self.loaders[name] = spec.loader
        return importlib.machinery.ModuleSpec(name, self, origin=spec.origin, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        module.__file__ = self.loaders[module.__name__].path
        module.__path__ = [str(Path(str(module.__file__)).parent)]
        with contextlib.suppress(Exception):
            self.loaders[module.__name__].exec_module(module)


def load(repo: Path, file: str, patch: tuple[str, str] = ("", "")) -> types.ModuleType:
    """Import a file of a checkout; packages that are not installed are stubs.

    Its parents are empty packages, or, if it cannot be imported so, those of them that raise are.

    Args:
        repo: the checkout's folder.
        file: path in it.
        patch: regular expression and replacement, applied to the text in memory.
    """
    parts = file.removesuffix(".py").split("/")
    depth = max((i + 1 for i, part in enumerate(parts) if not part.isidentifier()), default=0)
    root, names = repo.joinpath(*parts[:depth]), parts[depth:]
    text = (repo / file).read_text(errors="replace")
    if patch[0]:
        text = re.sub(*patch, text)
    finders: list[Any] = [_Lenient(repo), _Missing(repo)]
    forget(repo)  # what an earlier call has imported: some registries refuse a name twice
    sys.path.insert(0, str(root))
    sys.meta_path[:] = [finders[0], *sys.meta_path, finders[1]]
    try:
        try:
            return _run(root, names, text, str(repo / file))
        except ImportError:  # its neighbors import the file, or it needs its parents
            forget(repo)
            if patch[0]:
                raise
            return importlib.import_module(".".join(names))
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in finders]
        sys.path.remove(str(root))
        for name in [name for name, held in sys.modules.items() if isinstance(held, _Stub)]:
            del sys.modules[name]


def forget(repo: Path) -> None:
    """Remove the checkout's modules from sys.modules."""
    for name, module in list(sys.modules.items()):
        held = getattr(module, "__dict__", {})
        paths = held.get("__path__")
        if any(_is_in(repo, place) for place in (held.get("__file__"), *(paths if isinstance(paths, list) else ()))):
            del sys.modules[name]


def _is_in(repo: Path, place: Any) -> bool:
    """Return True for a path in the checkout, but not in an environment there."""
    return str(place).startswith(f"{repo}/") and "site-packages" not in str(place)


def _run(root: Path, names: list[str], text: str, file: str) -> types.ModuleType:
    """Run the text as the module `names`, in parents that are empty packages if they are not imported yet."""
    for end in range(1, len(names)):
        parent = types.ModuleType(".".join(names[:end]))
        parent.__path__ = [str(root.joinpath(*names[:end]))]
        sys.modules.setdefault(parent.__name__, parent)
    module = types.ModuleType(".".join(names))
    module.__file__, module.__package__ = file, module.__name__.rpartition(".")[0]
    sys.modules[module.__name__] = module
    exec(compile(text, file, "exec"), vars(module))
    return module
