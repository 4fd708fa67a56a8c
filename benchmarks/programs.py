"""The programs that are measured, and the machine they run on."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_FAKE_CPUS = Path(__file__).resolve().with_name("fake_cpus.c")
_SECONDS = 20.0


@dataclass(frozen=True)
class Program:
    """What is measured: a command with the reference's flags."""

    name: str
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment."""

    def bytes(self) -> int | None:
        """Size of the file; None if the command is an interpreter with a script or module."""
        file = shutil.which(self.command[0])
        if file is None or Path(file).name.startswith("python"):
            return None
        return Path(file).stat().st_size

    def output(self, *arguments: str) -> tuple[str, float]:
        """Run it to its end; its output, and the seconds that took. Raises if it fails."""
        begin = time.perf_counter()
        ended = subprocess.run(
            [*self.command, *arguments],
            check=True,
            env=environment(self.variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        return ended.stdout, time.perf_counter() - begin


def chosen(folder: Path, command: str, reference: str) -> list[Program]:
    """The program under test, which unpacks into folder, and the reference if there is one."""
    unpacked = {"SHIV_ROOT": str(folder / "unpacked")}
    found = [Program("program", tuple(shlex.split(command)), unpacked)]
    if reference:
        found.append(Program("reference", tuple(shlex.split(reference))))
    return found


def with_cpus(program: Program, count: int, folder: Path) -> Program:
    """The same program, on a machine that seems to have that many processors."""
    library = folder / "fake_cpus.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(_FAKE_CPUS), "-ldl"],
        check=True,
    )
    faked = {"LD_PRELOAD": str(library), "FAKE_CPUS": str(count)}
    return Program(f"{count} CPUs", program.command, {**program.variables, **faked})


def machine(shown: Sequence[Program]) -> list[str]:
    """Describe this machine and the programs, one line each."""
    system = os.uname()
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        system.machine,
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    about = (
        f"machine    {model}, {len(os.sched_getaffinity(0))} CPUs, {memory:.0f} GiB, {system.sysname} {system.release},"
        f" load {os.getloadavg()[0]:.1f} before the run"
    )
    lines = [about]
    for program in shown:
        try:
            version = program.output("--version")[0].strip()
        except (subprocess.SubprocessError, OSError):
            version = ""
        lines.append(f"{program.name:10} {shlex.join(program.command)} {version and f'({version})'}")
    return lines


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """The variables that a measured program gets: ours, and more."""
    variables = {**os.environ, **more}
    # With it, every start would compile modules anew, which is not what is measured here.
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    return variables
