"""Running a user's Python file: its neighbours importable, nothing else's modules in the way, its errors readable."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from dbconvert.errors import DBConvertError, UsageError

_loaded_from: dict[str, Path] = {}
"""Modules that users' files imported from their own folder, so that the next folder's can take their names."""


def load_file(path: Path) -> ModuleType:
    """Executes a Python file as a module of its own.

    Raises:
        UsageError: there is no such file.
        DBConvertError: it fails; the message holds the traceback, shortened to the user's frames.
    """
    path = real(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    name = f"dbconvert_source_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with neighbours_importable(path.parent), explained(path):
        spec.loader.exec_module(module)
    return module


def real(path: Path) -> Path:
    """The file itself, links followed, but for those to a file of another name: the hub cache's blobs have none."""
    resolved = path.resolve()
    return resolved if resolved.name == path.name else path.absolute()


@contextmanager
def neighbours_importable(folder: Path) -> Iterator[None]:
    """Makes the modules of `folder` importable by their bare names, before anything else's of that name."""
    for name, home in list(_loaded_from.items()):
        if home != folder:
            sys.modules.pop(name, None)
            del _loaded_from[name]
    before, write_bytecode = set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = write_bytecode
        for name in set(sys.modules) - before:
            if own_file(sys.modules[name], folder) is not None and not name.startswith("dbconvert_source_"):
                _loaded_from[name] = folder


def own_file(module: ModuleType | None, folder: Path) -> Path | None:
    """The module's file relative to `folder`, None if it lies elsewhere."""
    file = getattr(module, "__file__", None)
    if not file:
        return None
    path = real(Path(file))
    inside = path.is_relative_to(folder) and "site-packages" not in path.relative_to(folder).parts
    return path.relative_to(folder) if inside else None


def imported_neighbours(path: Path) -> tuple[Path, ...]:
    """The file itself and the files of its folder that it has imported, relative to the folder; also those that were
    imported before it was loaded, as in a notebook."""
    folder = real(path).parent
    found = {own_file(sys.modules.get(name), folder) for name, home in _loaded_from.items() if home == folder}
    named = (own_file(sys.modules.get(name), folder) for name in named_modules(path))
    others = sorted(file for file in {*found, *named} if file is not None and file != Path(path.name))
    return (Path(path.name), *others)


def named_neighbours(path: Path) -> tuple[Path, ...]:
    """The file itself and the files of its folder that its imports name, one after the other, without running it."""
    return (Path(path.name), *sorted(set(named_modules(path).values()) - {Path(path.name)}))


def named_modules(path: Path) -> dict[str, Path]:
    """Modules that lie in a file's folder and that its imports name, and theirs; files relative to the folder."""
    folder, found, waiting = real(path).parent, dict[str, Path](), [Path(path.name)]
    while waiting:
        for name in named_imports(folder, waiting.pop()):
            places = Path(*name.split(".")).with_suffix(".py"), Path(*name.split("."), "__init__.py")
            file = next((place for place in places if (folder / place).is_file()), None)
            if file is not None and name not in found:
                found[name] = file
                waiting.append(file)
    return found


def named_imports(folder: Path, file: Path) -> Iterator[str]:
    """Modules that a file of `folder`, relative to it, names in its imports, with the packages they lie in."""
    for node in ast.walk(ast.parse((folder / file).read_bytes())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            above = file.parts[: -node.level] if node.level else ()
            base = [*above, *(node.module or "").split(".")] if node.module else list(above)
            names = [".".join(base), *(".".join([*base, alias.name]) for alias in node.names)]
        for name in filter(None, names):
            parts = name.split(".")
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns whatever a user's code raises into one message with the user's own frames."""
    try:
        yield
    except (DBConvertError, KeyboardInterrupt):
        raise
    except BaseException as error:
        frames = user_traceback(error, real(path).parent)
        raise DBConvertError(f"{path.name} failed:\n{frames}", hint=f"python {path} should run on its own") from error


def user_traceback(error: BaseException, folder: Path) -> str:
    """The traceback without the frames of libraries and of this program."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(folder)]
    lines = traceback.format_list(frames) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()


def sha256_files(folder: Path, files: tuple[str, ...]) -> str:
    """Identity of a set of source files: their names and contents."""
    digest = hashlib.sha256()
    for name in sorted(files):
        content = (folder / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
