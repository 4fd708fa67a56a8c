"""Postponed imports, each in a Python of its own, since they change what every later import finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import program
import pytest

from livenessprobe.postponed import UNUSED, UNUSED_SERVING

if TYPE_CHECKING:
    from pathlib import Path

LOADED = """
import sys
names = [name for name in postponed.UNUSED | postponed.UNUSED_SERVING if not isinstance(sys.modules.get(name), postponed.Postponed)]
"""


def python(code: str, measured: bool = True) -> str:
    """What these lines print after `postponed` is imported; not measured, since coverage loads modules itself."""
    start = f"import sys; sys.path.insert(0, {str(program.ROOT)!r}); from livenessprobe import postponed\n"
    env = {name: value for name, value in os.environ.items() if measured or not name.startswith("COVERAGE_")}
    command = [sys.executable, "-I", "-c", start + code]
    done = subprocess.run(command, capture_output=True, check=True, env=env, text=True, timeout=30)
    return done.stdout.strip()


def test_a_postponed_module_is_loaded_at_its_first_use() -> None:
    code = """
postponed.postpone({"colorsys": {}})
import colorsys
print(type(colorsys).__name__, colorsys.rgb_to_hsv(1, 1, 1), type(sys.modules["colorsys"]).__name__)
print(colorsys.hsv_to_rgb is sys.modules["colorsys"].hsv_to_rgb)
"""
    assert python(code).split("\n") == ["Postponed (0.0, 0.0, 1) module", "True"]


def test_what_is_copied_at_import_is_there_without_loading() -> None:
    code = """
postponed.postpone({"colorsys": {"rgb_to_hsv": 1}})
from colorsys import rgb_to_hsv
print(rgb_to_hsv, type(sys.modules["colorsys"]).__name__)
from colorsys import hsv_to_rgb
print(hsv_to_rgb.__name__, type(sys.modules["colorsys"]).__name__)
"""
    assert python(code).split("\n") == ["1 Postponed", "hsv_to_rgb module"]


def test_a_child_is_found_in_its_package() -> None:
    code = """
postponed.postpone({"xml.sax": {}})
import xml.sax
print(type(xml.sax).__name__, xml.sax.SAXException.__name__, type(xml.sax).__name__)
"""
    assert python(code) == "Postponed SAXException module"


def test_a_module_that_is_loaded_stays() -> None:
    code = """
import colorsys
postponed.postpone({"colorsys": {"rgb_to_hsv": 1}})
print(sys.modules["colorsys"] is colorsys, callable(colorsys.rgb_to_hsv))
"""
    assert python(code) == "True True"


def test_one_that_does_not_exist_says_so_at_its_use() -> None:
    code = """
postponed.postpone({"no_such_module": {}})
import no_such_module
try:
    no_such_module.anything
except ImportError as error:
    print(error)
"""
    assert python(code) == "No module named 'no_such_module'"


def test_threads_that_use_one_at_the_same_moment_all_meet_it_whole(folder: Path) -> None:
    """Each thread halts at a different line of load(), while another one is loading."""
    names = [f"postponed_{number}" for number in range(24)]
    for name in names:
        (folder / f"{name}.py").write_text("import time\ntime.sleep(0.03)\nlast = 1\n")
    code = f"""
import threading, time
sys.path.insert(0, {str(folder)!r})
names, found, start = {names!r}, [], threading.Barrier(6)
postponed.postpone(dict.fromkeys(names, {{}}))

def use(halt):
    def halting(frame, event, _):
        nonlocal lines
        if frame.f_code is postponed.load.__code__:
            if lines == halt:
                time.sleep(0.01 if halt else 0.005)  # the first one is ahead
            lines += 1
            return halting
    sys.settrace(halting)
    for name in names:
        module, lines = sys.modules[name], 0
        start.wait()
        try:
            found.append(module.last)
        except Exception as error:
            found.append(repr(error))

users = [threading.Thread(target=use, args=[halt]) for halt in range(6)]
for user in users:
    user.start()
for user in users:
    user.join()
print(len(found), *sorted(set(map(str, found))))
"""
    assert python(code, measured=False) == "144 1"


@pytest.mark.parametrize(
    ("modules", "used"),
    [
        ("livenessprobe.serve", set()),
        ("livenessprobe.serve, livenessprobe.driver, livenessprobe.unix_call", set()),
        (
            "livenessprobe.serve, livenessprobe.driver, livenessprobe.unix_call, livenessprobe.metrics",
            set(),
        ),
        (
            "livenessprobe.serve, livenessprobe.driver, livenessprobe.grpc_call",
            {"inspect", "traceback", "string"},
        ),
    ],
)
def test_the_program_leaves_unloaded_what_it_does_not_use(modules: str, used: set[str]) -> None:
    """Otherwise a new version of a library uses one of them, and the table no longer tells the truth."""
    code = f"""
postponed.postpone(postponed.UNUSED)
postponed.postpone(postponed.UNUSED_SERVING)
import {modules}
{LOADED}
import json
print(json.dumps(names))
"""
    assert set(json.loads(python(code, measured=False))) <= used


def test_every_entry_of_the_table_is_imported_by_something() -> None:
    code = """
import logging, http.server, google.protobuf.wrappers_pb2, prometheus_client, dataclasses, grpc
print(*(name for name in postponed.UNUSED | postponed.UNUSED_SERVING if name not in sys.modules))
"""
    assert python(code, measured=False) == ""
    assert UNUSED.keys() | UNUSED_SERVING.keys()


def test_a_check_without_a_server_imports_nothing_that_is_postponed_for_serving() -> None:
    """Otherwise it belongs into the other table."""
    code = """
postponed.postpone(postponed.UNUSED)
import livenessprobe.command, livenessprobe.once, livenessprobe.driver, livenessprobe.unix_call, livenessprobe.grpc_call
print(*(name for name in postponed.UNUSED_SERVING if name in sys.modules))
"""
    assert python(code, measured=False) == ""
