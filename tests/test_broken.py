"""Broken installations: reported in one line, with an exit code that does not blame the driver."""

import os
import pty
import subprocess
from pathlib import Path

import program


def environment(folder: Path) -> dict[str, str]:
    """One in which the modules in this folder hide the real ones."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(program.ROOT)])}


def test_a_module_of_ours_that_cannot_be_loaded(folder: Path) -> None:
    (folder / "resource.py").write_text("raise ImportError('no such thing')\n")
    ended = program.run_once(["--http-endpoint=127.0.0.1:0"], command=program.MODULE, env=environment(folder))

    assert ended.returncode == 1
    assert ended.stderr.endswith(
        '"Unexpected error, please report it" err="ImportError(\'no such thing\')"\n'
    )
    assert ended.stderr.count("\n") == 1


def test_once_says_nothing_while_it_loads_and_then_what_was_wrong(folder: Path) -> None:
    """On a terminal, where it would soon say what it is waiting for; here there is nothing to wait for yet."""
    (folder / "grpc.py").write_text("import time\ntime.sleep(1)\nraise ImportError('no such thing')\n")
    terminal, standard_error = pty.openpty()
    try:
        ended = subprocess.run(
            [*program.MODULE, "--once", "--csi-address=dns:///127.0.0.1:1"],
            check=False,
            cwd=program.ROOT,
            env=os.environ | environment(folder),
            stderr=standard_error,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=30,
        )
        os.write(standard_error, b"end")
        said = os.read(terminal, 1000)
    finally:
        os.close(terminal)
        os.close(standard_error)

    assert ended.returncode == 4
    assert ended.stdout == (
        "rpc error: code = Internal desc = the liveness probe itself failed: ImportError('no such thing')\n"
    )
    assert said == b"end"
