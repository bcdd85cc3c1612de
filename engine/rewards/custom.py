"""A user's own reward, from `path/to/file.py:function`."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

from engine.errors import UserError


def load_function(path: str, name: str, say: Callable[[str], object]) -> Callable[[str, dict], float]:
    """The function `name` of the file, which is run once, as `say` hears before. Raises UserError if either is not
    there or not usable.

    While it runs, files and packages beside it can be imported, unless the program has a module of that name: ours come
    first. What it so imported belongs to it alone: another file with another `helper.py` beside it gets its own. An
    import inside the function comes too late for that. So it is with folders that the file puts on `sys.path` itself.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"There is no file {path} to take the reward {name!r} from; check the path.")
    say(f"Running {file} for the reward {name!r}.")
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
        with _importable(file.parent), chdir("."):  # back to it, wherever the file goes
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise UserError(f"{file} fails when it is run ({type(error).__name__}: {error}); correct it.") from error
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Puts the folder last on the path; afterwards takes all new folders out of it, and the modules found in them."""
    known, path = set(sys.modules), list(sys.path)
    if str(folder) not in path:
        sys.path.append(str(folder))
    try:
        yield
    finally:
        gained = {Path(place).resolve() for place in set(sys.path) - set(path)}
        sys.path[:] = path
        new = set(sys.modules) - known
        tops = {name for name in new if "." not in name and _folder_of(sys.modules[name]) in gained}
        for name in new:
            if name.partition(".")[0] in tops:
                del sys.modules[name]


def _folder_of(module) -> Path:
    places = [*getattr(module, "__path__", []), getattr(module, "__file__", None) or ""]
    return Path(places[0]).resolve().parent
