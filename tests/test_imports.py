"""Who may import whom: the star of sibling imports, and one module for each heavy import."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "livenessprobe"
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "identity_pb2"}

# Leaves may use quoting, which imports nothing.
SIBLINGS = {
    "__main__": {"command", "postponed"},
    "command": {
        "config",
        "goflags",
        "listening",
        "log",
        "once",
        "postponed",
        "resolving",
        "serve",
        "versions",
        "writer",
    },
    "serve": {
        *("checks", "config", "driver", "driver_name", "exchange", "health", "history", "metrics"),
        *("limits", "listening", "routes", "stopping", "threads", "versions", "web"),
    },
    "routes": {"checks", "exchange", "health", "history", "metrics", "quoting", "status"},
    "once": {"config", "driver", "health", "progress", "quoting", "stopping", "threads", "writer"},
    "progress": {"health"},
    "web": {"connection", "exchange", "limits", "listening"},
    "threads": {"limits"},
    "listening": {"config", "exchange", "resolving"},
    "connection": {"exchange"},
    "checks": {"health", "stopping"},
    "history": {"health"},
    "status": {"history", "quoting"},
    "driver_name": {"stopping"},
    "driver": {"grpc_call", "health", "identity_pb2", "rpc", "unix_call"},
    "grpc_call": {"rpc", "stopping"},
    "unix_call": {"http2_call", "rpc", "stopping"},
    "http2_call": {"grpc_answer", "http2_frames", "rpc"},
    "grpc_answer": {"rpc"},
    "config": {"address", "goflags", "quoting"},
    "goflags": {"quoting"},
    "health": {"quoting"},
    "log": {"limits", "quoting", "writer"},
    "writer": {"threads"},
    "resolving": {"threads"},
}
ONLY_IN: dict[str, set[str]] = {
    "grpc": {"grpc_call"},
    "google": {"driver"},
    "hpack": {"http2_call", "http2_frames"},
    "prometheus_client": {"metrics"},
    "http.server": {"exchange"},
    "dataclasses": set(),  # each takes a third of a millisecond of every start; a NamedTuple takes a tenth of that
}


def imported(path: Path) -> set[str]:
    """Every absolute name that a file imports, inside functions too, as package.module or package.module.name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["livenessprobe" if node.level else "", node.module or ""]))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_are_a_star(module: str) -> None:
    names = imported(MODULES[module])
    siblings = {name.split(".")[1] for name in names if name.startswith("livenessprobe.")} - {"__version__"}

    assert "livenessprobe" not in names, "import the module that is meant"
    assert siblings <= SIBLINGS.get(module, set())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_imports_have_one_place(module: str) -> None:
    names = imported(MODULES[module])

    assert {heavy for heavy in ONLY_IN if any(within(name, heavy) for name in names)} == {
        heavy for heavy, owners in ONLY_IN.items() if module in owners
    }


def test_the_package_itself_holds_a_version_and_nothing_else() -> None:
    docstring, version = ast.parse(MODULES["__init__"].read_text()).body

    assert isinstance(docstring, ast.Expr)
    assert isinstance(version, ast.Assign)
    assert ast.unparse(version.targets[0]) == "__version__"
