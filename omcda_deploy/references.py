"""Callables of the user's own, named ``module:callable``, and what goes wrong in them.

A module is looked for among the installed packages and in the working folder. Errors of user code name the
reference, what happened, and the user's file and line.

A reference runs code. One that the user gives is trusted (:func:`trust`). One that a file names, as datasets and
runs name the environment that they were recorded in, is not: whoever plays it calls :func:`require_trusted` first.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omcda_deploy.errors import ConfigError, OmcdaError, PluginError, TerminatedError

_PACKAGE = str(Path(__file__).parent)
_TRUSTED = "OMCDA_TRUSTED_REFERENCES"  # in the environment, so that processes started from here inherit it


def is_reference(name: str) -> bool:
    """Tell a reference from a name of this package's own, which has no colon."""
    return ":" in name


def trust(name: str) -> None:
    """Let this process and its children run a reference that files name; other names are no matter of trust."""
    if is_reference(name):
        os.environ[_TRUSTED] = "\n".join((*_trusted(), name))


def require_trusted(name: str) -> None:
    """Raise :class:`ConfigError` for a reference that the user has not given."""
    if is_reference(name) and name not in _trusted():
        raise ConfigError(
            f"the environment is {name}, code that this command did not ask for: add  --env {name}  to run it"
        )


def _trusted() -> list[str]:
    return os.environ.get(_TRUSTED, "").splitlines()


def load_callable(reference: str) -> Callable[..., Any]:
    """Import what ``module:callable`` names; the callable may be an attribute of an attribute.

    Raises :class:`ConfigError` for another form and :class:`PluginError` where there is no such callable.
    """
    module_name, _, path = reference.partition(":")
    names = path.split(".")
    if not all(name.isidentifier() for name in (*module_name.split("."), *names)):
        raise ConfigError(f"{reference!r}: expected module:callable, such as warehouse:make")
    if module_name.endswith(".py"):
        raise ConfigError(f"{reference!r}: expected a module's name: leave out .py")
    found: Any = _import(reference, module_name)
    for name in names:
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, dir(found), n=1)
            hint = f": did you mean {near[0]!r}?" if near else ": define it there, or name another"
            raise PluginError(f"{reference}: {_place(found)} has no {name}{hint}")
        found = getattr(found, name)
    if not callable(found):
        raise PluginError(
            f"{reference}: expected a callable, got {found!r} of type {type(found).__name__}: name a function or a "
            "class"
        )
    called: Callable[..., Any] = found
    return called


def require_arguments(reference: str, called: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """Raise :class:`PluginError` unless ``called`` can be called with these arguments."""
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # some builtins do not say
        return
    try:
        signature.bind(*arguments, **named)
    except TypeError as error:
        given = ", ".join([*("…" for _ in arguments), *(f"{name}=…" for name in named)])
        raise PluginError(
            f"{reference}: it is called as {reference.partition(':')[2]}({given}), but is declared as "
            f"{signature}: {error}"
        ) from error


@contextmanager
def user_code(what: str, raises: type[OmcdaError]) -> Iterator[None]:
    """Turn any exception of user code into one of type ``raises``, whose message says where it came from.

    ``sys.exit()`` is one, too: it would end the command, as if all were done.
    """
    try:
        yield
    except (OmcdaError, TerminatedError):
        raise
    except (Exception, SystemExit) as error:
        raise raises(f"{what} raised {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """Describe an exception in one line: its type and message, and the user's file and line."""
    lines = str(error).strip().splitlines()
    message = f": {lines[0]}" if lines else ""
    if isinstance(error, SyntaxError):  # its own message has the place
        return f"{type(error).__name__}: {error}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_PACKAGE, "<frozen"))
    ]
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    own = [frame for frame in frames if not frame.filename.startswith(libraries)] or frames
    place = f" ({_short(own[-1].filename)}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{message}{place}"


def _import(reference: str, name: str) -> Any:
    """Import the module ``name``; the working folder is searched after everything else."""
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()  # the file may be younger than the last look
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise PluginError(
                f"{reference}: found no module {error.name}, neither installed nor in {folder}: run this in the "
                "folder that holds it, or install it"
            ) from error
        raise PluginError(f"{reference}: {name} needs {error.name}, which is not installed") from error
    except TerminatedError:
        raise
    except (Exception, SystemExit) as error:  # whatever a module raises that is not ours
        raise PluginError(f"{reference}: {name} cannot be imported: {describe_error(error)}") from error


def _place(found: Any) -> str:
    """Name a module with its file, and anything else by its own name."""
    name = getattr(found, "__qualname__", getattr(found, "__name__", type(found).__name__))
    file = getattr(found, "__file__", None)
    return f"{name} ({_short(file)})" if file else str(name)


def _short(file: str) -> str:
    """Shorten a path to one from the working folder, where it lies below."""
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative
