"""Versions of what is inside, without loading it."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec


def grpcio() -> str:
    """Return grpcio's version; it is loaded only for targets other than unix sockets, and takes its time."""
    package = _find("grpc", None)
    spec = package and _find("grpc._grpcio_metadata", package.submodule_search_locations)
    if spec is None or spec.loader is None:
        return "none"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.__version__)


def _find(name: str, locations: Sequence[str] | None) -> ModuleSpec | None:
    """Find a module as an import does, but without loading its package."""
    return next(filter(None, (finder.find_spec(name, locations) for finder in sys.meta_path)), None)
