"""A user's own reward, from `path/to/file.py:function`."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from engine.errors import UserError


def load_function(path: str, name: str) -> Callable[[str, dict], float]:
    """The function `name` of the file, which is run once. Raises UserError if either is not there or not usable."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"There is no file {path} to take the reward {name!r} from; check the path.")
    module = _run_file(file)
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"{path} has no function {name!r}; it has {', '.join(functions) or 'none'}.")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"{name!r} in {path} is {function!r}, not a function; give a function of (text, row).")
    try:
        inspect.signature(function).bind("", {})
    except TypeError as error:
        raise UserError(
            f"{name!r} in {path} cannot be called as {name}(text, row) ({error}); give it these two parameters."
        ) from error
    return function


def _run_file(file: Path):
    module_name = f"reward_file_{file.stem}_{abs(hash(str(file)))}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise UserError(f"{file} fails when it is run ({type(error).__name__}: {error}); correct it.") from error
    return module
