"""Versions of what is inside, without loading it."""

from importlib.machinery import PathFinder
from importlib.util import module_from_spec


def grpcio() -> str:
    """Return grpcio's version; it is loaded only for targets other than unix sockets, and takes its time."""
    package = PathFinder.find_spec("grpc")
    spec = package and PathFinder.find_spec("_grpcio_metadata", package.submodule_search_locations)
    if spec is None or spec.loader is None:
        return "none"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.__version__)
