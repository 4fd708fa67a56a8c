"""The packed file: its bytes, its content, and how it starts on hosts that fit, that do not, or that are hostile."""

import ast
import fcntl
import marshal
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import this_run
from denying import denying
from fake_driver import FakeDriver

ROOT = Path(__file__).parent.parent
FILE = ROOT / "bin" / "livenessprobe"
HERE = "{}.{}".format(*sys.version_info)
OTHER = "3.12" if HERE == "3.13" else "3.13"
NOBODY = 65534


def find_old(folder: Path) -> None:
    """Make a file for each old Python that starts."""
    for version in ("2.7", *(f"3.{minor}" for minor in range(4, 10))):
        command = f"python{version} --version"  # a shell's, which says so if there is none
        if subprocess.run(["sh", "-c", command], capture_output=True, check=False).returncode == 0:
            (folder / version).touch()


# Those at hand: no Debian release has them, so they are tried wherever somebody keeps old ones. To ask a version manager
# takes half a second.
OLD = sorted(path.name for path in this_run.made_once("old-pythons", find_old).iterdir())
# As /bin/sh may be, those at hand.
SHELLS = [
    shell for shell in ("sh", "dash", "bash", "busybox sh", "ksh", "mksh") if shutil.which(shell.split()[0])
]
AS_ROOT = os.geteuid() == 0

# Several builds, from nothing.
pytestmark = [pytest.mark.timeout(400), pytest.mark.unmeasured]
VERSION = re.compile(r"livenessprobe \S+ \(Python \S+, grpcio [\d.]+\)\n")


class Host:
    """Starts a packed file in an environment with nothing but PATH and what a test adds."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        # Copied here, as to a host; also, not every user may enter this checkout's folder.
        self.file = Path(shutil.copy(FILE, folder))

    def start(
        self,
        file: Path | None = None,
        *arguments: str,
        before: Sequence[str | Path] = (),
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """`before` goes before the file on the command line; `env` replaces this host's cache folder."""
        return subprocess.run(
            [*before, file or self.file, *(arguments or ["--version"])],
            env={"PATH": os.environ["PATH"], **({"SHIV_ROOT": str(self.cache)} if env is None else env)},
            capture_output=True,
            check=False,
            text=True,
            timeout=60,
            **options,
        )

    def runs(self, file: Path | None = None, **options: Any) -> None:
        done = self.start(file, **options)

        assert VERSION.fullmatch(done.stdout), done
        assert (done.returncode, done.stderr) == (0, "")

    def checks(self, driver: FakeDriver, before: Sequence[str | Path] = ()) -> None:
        """It finds a driver healthy."""
        done = self.start(self.file, "--once", f"--csi-address={driver.address}", before=before)

        assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")

    def refuses(self, file: Path | None = None, **options: Any) -> str:
        """It prints one line and exits with 1; returns the line."""
        done = self.start(file, **options)

        assert (done.returncode, done.stdout) == (1, ""), done
        assert re.fullmatch("livenessprobe: .*\n", done.stderr), done.stderr
        return done.stderr


@pytest.fixture
def host(folder: Path) -> Host:
    return Host(folder)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files packed at the same time, each from its own copy of the sources, by builders with different settings.

    What comes from other projects is fetched and compressed anew for the one whose bytes are compared.
    """
    targets = {
        "same": ([], 0o077),
        "python": (["--python-version", OTHER, "--platform", "linux/amd64"], 0o022),
        "machine": (["--python-version", OTHER, "--platform", "linux/arm64"], 0o022),
    }
    made, running = {}, []
    for name, (options, umask) in targets.items():
        copy = tmp_path_factory.mktemp(name)
        shutil.copy(ROOT / "LICENSE", copy)
        for part in ("build", "livenessprobe"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        kept = copy / "bin" / "kept"
        if name == "same":
            for left, age in (("tmpold", 7200), ("tmpnew", 60)):
                (kept / left).mkdir(parents=True)
                os.utime(kept / left, (0, time.time() - age))
        else:
            kept.parent.mkdir()
            kept.symlink_to(FILE.parent / "kept")
        made[name] = copy / "out" / "file"
        command = [sys.executable, "build/here/pyz.py", *options, "out/file"]
        running.append(subprocess.Popen(command, cwd=copy, umask=umask))
    assert [process.wait() for process in running] == [0, 0, 0]
    return made


def in_namespace(mounts: str, *arguments: str | Path) -> list[str | Path]:
    """What to put before a command to give it mounts of its own, which end with it."""
    unshare = ["unshare", "--mount"] if AS_ROOT else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run(
        [*unshare, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    ).returncode:
        pytest.skip("this sandbox lets nobody mount a file system")
    return [*unshare, "sh", "-ec", f'{mounts}; shift {len(arguments)}; exec "$@"', "sh", *arguments]


# ---- what is packed


def machine_code(file: Path) -> dict[str, bytes]:
    """All compiled modules that are packed in a file."""
    with zipfile.ZipFile(file) as archive:
        modules = {Path(path).name: archive.read(path) for path in archive.namelist() if path.endswith(".so")}
        with archive.open("cores.tar.xz") as stream, tarfile.open(fileobj=stream) as cores:
            for member in cores:
                core = cores.extractfile(member)
                assert core
                modules[member.name] = core.read()
    return modules


def test_packs_for_each_python() -> None:
    tags = ("310", "311", "312", "313", "314")
    machine = os.uname().machine

    assert set(machine_code(FILE)) == {
        "_message.abi3.so",
        *(f"cygrpc.cpython-{tag}-{machine}-linux-gnu.so" for tag in tags),
    }


def test_shiv_knows_it() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("shiv-info"), FILE], check=True, capture_output=True, text=True
    )

    assert "entry_point: livenessprobe.__main__:main" in done.stdout


def test_same_sources_give_the_same_bytes(builds: dict[str, Path]) -> None:
    assert builds["same"].read_bytes() == FILE.read_bytes(), (
        "bin/livenessprobe is not of these sources: make livenessprobe"
    )
    assert stat.S_IMODE(builds["same"].stat().st_mode) == 0o755
    with zipfile.ZipFile(FILE) as archive:
        names = archive.namelist()
    assert names == sorted(names), "in an order that no file system has a say in"


def test_what_a_killed_build_left_is_removed(builds: dict[str, Path]) -> None:
    kept = builds["same"].parent.parent / "bin" / "kept"

    assert [path.name for path in kept.glob("tmp*")] == ["tmpnew"], "another build may be at that one"


def test_is_small() -> None:
    assert FILE.stat().st_size <= 0.6 * 19_500_000


@pytest.mark.parametrize(("name", "machine", "elf"), [("python", "x86_64", 62), ("machine", "aarch64", 183)])
def test_packs_for_another_python_and_machine(
    builds: dict[str, Path], name: str, machine: str, elf: int
) -> None:
    modules = machine_code(builds[name])

    assert set(modules) == {
        f"cygrpc.cpython-{OTHER.replace('.', '')}-{machine}-linux-gnu.so",
        "_message.abi3.so",
    }
    for code in modules.values():
        assert code[:6] == b"\x7fELF\x02\x01"
        assert int.from_bytes(code[18:20], "little") == elf


def test_has_the_licence_of_each_distribution() -> None:
    with zipfile.ZipFile(FILE) as archive:
        names = archive.namelist()
    distributions = {name.split("/")[1] for name in names if ".dist-info/" in name}

    assert {name.split("-")[0] for name in distributions} >= {"grpcio", "protobuf", "prometheus_client"}
    for distribution in distributions:
        assert any(f"/{distribution}/" in name and "LICENSE" in name for name in names), distribution
    assert "site-packages/livenessprobe/LICENSE" in names


def test_what_is_left_out_is_not_imported() -> None:
    with zipfile.ZipFile(FILE) as archive:
        names = set(archive.namelist())
        sources = {name: archive.read(name) for name in names if re.match(r"site-packages/.*\.py$", name)}

    def packed(module: str) -> bool:
        if module == "grpc._cython.cygrpc":  # beside the others
            return True
        path = "site-packages/" + module.replace(".", "/")
        return any(name.startswith((path + "/", path + ".")) for name in names)

    missing = set()
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            wanted = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                wanted = [node.module or ""]
            missing |= {
                (name, module)
                for module in wanted
                if module.split(".")[0] in ("google", "grpc", "prometheus_client", "livenessprobe")
                and not packed(module)
                and find_spec(module)
            }
    assert missing == set()


# ---- hosts that fit


def test_runs_copied_and_renamed_from_one_cache(host: Host, folder: Path) -> None:
    copy = Path(shutil.copy(FILE, folder / "another name"))
    host.runs()
    before = [(path, path.lstat().st_mtime_ns) for path in sorted(host.cache.rglob("*"))]

    host.runs(copy)
    host.runs(copy, before=[sys.executable])

    assert before == [(path, path.lstat().st_mtime_ns) for path in sorted(host.cache.rglob("*"))]
    assert len(list(host.cache.iterdir())) == 1


def test_unpacks_only_what_a_unix_socket_needs(host: Host, driver: FakeDriver) -> None:
    host.runs()
    host.checks(driver)
    (folder,) = host.cache.iterdir()
    [protobuf, modules] = sorted(folder.iterdir())

    assert protobuf.name == "_message.abi3.so"
    assert re.fullmatch(rf"cpython-{HERE.replace('.', '')}-\d+", modules.name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4_000_000


def test_what_only_other_targets_need_is_unpacked_when_one_is_asked_for(host: Host) -> None:
    with FakeDriver("127.0.0.1:0") as driver:
        host.checks(driver)
        (folder,) = host.cache.iterdir()
        [core] = folder.glob("cygrpc.*")
        whole = core.read_bytes()
        core.write_bytes(whole[:-5])
        host.checks(driver)
        assert core.read_bytes() == whole

        core.unlink()
        read_only = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"'
        done = host.start(
            host.file, "--once", f"--csi-address={driver.address}", before=in_namespace(read_only, host.cache)
        )

    assert done.returncode == 4
    assert f"cannot unpack {core.name} into {folder}: Read-only file system" in done.stdout
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_several_first_starts_at_the_same_moment(host: Host) -> None:
    env = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(host.cache)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    starts = [subprocess.Popen([FILE, "--version"], env=env, text=True, **pipes) for _ in range(6)]  # type: ignore[call-overload]
    outputs = [(start.communicate(timeout=60), start.returncode) for start in starts]

    assert all(VERSION.fullmatch(out) for (out, _), _ in outputs), outputs
    assert {(err, code) for (_, err), code in outputs} == {("", 0)}
    assert len(list(host.cache.iterdir())) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_unpacks_ends_it_like_any_other(host: Host, number: signal.Signals) -> None:
    env = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(host.cache)}
    start = subprocess.Popen([FILE, "--health-port=0"], env=env, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 20
    while not host.cache.exists() or not list(host.cache.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.001)
    start.send_signal(number)
    _, errors = start.communicate(timeout=60)

    assert start.returncode == 0, errors
    assert all(re.match(r"[IWE]\d{4} ", line) for line in errors.splitlines()), errors


def test_a_folder_that_is_not_whole_is_made_whole(host: Host, driver: FakeDriver) -> None:
    host.checks(driver)
    (folder,) = host.cache.iterdir()
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(whole) >= 2

    for path, content in whole.items():
        middle = len(content) // 2
        for wrong in (None, b"", content[:middle], content[:middle] + bytes(4096) + content[middle + 4096 :]):
            path.unlink()
            if wrong is not None:
                path.write_bytes(wrong)
            host.checks(driver)
            assert path.read_bytes() == content
    shutil.rmtree(folder)
    host.checks(driver)
    assert {path: path.read_bytes() for path in folder.iterdir()} == whole


def test_what_a_killed_start_left_is_removed(host: Host) -> None:
    host.runs()
    (folder,) = host.cache.iterdir()
    left, new = folder / ".left", folder / ".new"
    left.touch()
    new.touch()
    os.utime(left, (0, 0))
    next(folder.glob("cpython*")).unlink()

    host.runs()

    assert not left.exists()
    assert new.exists(), "another start may be at it"


def test_runs_as_another_user_without_a_home(folder: Path) -> None:
    scratch = folder / "scratch"
    scratch.mkdir()
    scratch.chmod(0o1777)
    user = NOBODY if AS_ROOT else os.getuid()

    Host(folder).runs(env={"TMPDIR": str(scratch), "HOME": "/proc"}, user=user)

    assert [path.name for path in scratch.iterdir()] == [f"shiv-{user}"]
    assert (scratch / f"shiv-{user}").stat().st_uid == user


def test_home_comes_first(folder: Path) -> None:
    Host(folder).runs(env={"HOME": str(folder), "TMPDIR": "/proc"})

    assert [path.name for path in folder.iterdir() if path.is_dir()] == [".shiv"]


def test_an_unpacked_cache_needs_no_write_access_no_home_and_no_owner(host: Host) -> None:
    host.runs()
    read_only = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"'
    other = ["setpriv", "--reuid", "4711", "--regid", "4711", "--clear-groups"] if AS_ROOT else []

    host.runs(before=[*in_namespace(read_only, host.cache), *other])


def test_a_cache_that_lacks_something_and_cannot_be_written_does(host: Host, driver: FakeDriver) -> None:
    """Metrics are then unpacked in memory, and protobuf's Python code stands in for its machine code."""
    host.runs()
    (folder,) = host.cache.iterdir()
    (folder / "_message.abi3.so").unlink()
    for path in folder.glob("cpython*.*"):
        path.unlink()
    before = sorted(folder.iterdir())
    read_only = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"'

    host.checks(driver, before=in_namespace(read_only, host.cache))

    assert sorted(folder.iterdir()) == before


def test_nothing_installed_on_the_host_gets_in_the_way(host: Host, folder: Path) -> None:
    for name in ("grpc", "livenessprobe", "google", "typing_extensions", "http"):
        (folder / "evil" / name).mkdir(parents=True)
        (folder / "evil" / name / "__init__.py").write_text("raise SystemExit('evil')")
    env = {"SHIV_ROOT": str(host.cache), "PYTHONPATH": str(folder / "evil")}

    host.runs(env=env)
    host.runs(env=env, before=[sys.executable])


def test_nothing_else_of_the_environment_has_a_say(host: Host) -> None:
    switches = dict.fromkeys(("SHIV_INTERPRETER", "SHIV_FORCE_EXTRACT", "SHIV_ENTRY_POINT"), "1")

    host.runs(
        env={"SHIV_ROOT": str(host.cache), **switches, "LIVENESSPROBE_TRIED": "1 /usr/bin/python3 (evil)"}
    )


# ---- older builds


@pytest.fixture
def old(host: Host) -> Path:
    """Another build's folder, which nothing has used for 31 days."""
    old = host.cache / "livenessprobe_0"
    old.mkdir(parents=True)
    (old / "some file").touch()
    for path in (old / "some file", old):
        os.utime(path, (0, time.time() - 31 * 86400))
    return old


def test_what_nobody_used_for_30_days_goes(host: Host, old: Path) -> None:
    recent = shutil.copytree(old, host.cache / "livenessprobe_1")
    os.utime(recent, (0, time.time() - 29 * 86400))
    foreign = shutil.copytree(old, host.cache / "something else")
    os.utime(foreign, (0, 0))

    host.runs()

    assert (old.exists(), recent.exists(), foreign.exists()) == (False, True, True)


def test_what_is_in_use_stays(host: Host, old: Path) -> None:
    handle = os.open(old, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    host.runs()
    os.close(handle)

    assert old.exists()


def test_a_running_program_is_in_use(host: Host, driver: FakeDriver) -> None:
    command = [str(host.file), f"--csi-address={driver.target}", "--http-endpoint=127.0.0.1:0"]
    env = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(host.cache)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr
        assert "Serving" in running.stderr.readline()
        (folder,) = host.cache.iterdir()
        handle = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        running.terminate()


def test_a_start_tells_once_a_day_that_it_is_used(host: Host) -> None:
    host.runs()
    (folder,) = host.cache.iterdir()
    [modules] = (path for path in folder.glob("cpython*") if not path.suffix)
    for age, marked in ((86400 * 2, True), (3600, False)):
        before = time.time() - age
        os.utime(modules, (before, before))
        host.runs()
        assert (modules.stat().st_mtime > before + 60) is marked


# ---- which Python

SHIM = "#!/bin/sh\necho 'pyenv: no such version' >&2\nexit 127\n"


class Pythons:
    """A host with just the Pythons that a test puts into its folders, which stand for /usr/bin and for PATH."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._host, self.usual, self.path = host, folder / "usual", folder / "path"
        self.usual.mkdir()
        self.path.mkdir()
        content = FILE.read_bytes()
        for place in (b"/usr/local/bin/", b"/usr/bin/"):
            content = content.replace(b'"%s$name"' % place, b'"%s/$name"' % bytes(self.usual))
        self.file = folder / "livenessprobe"
        self.file.write_bytes(content)

    def add(self, place: Path, name: str, script: str = "") -> Path:
        """This test's Python by another name, or a script."""
        added = place / name
        if script:
            added.write_text(script)
            added.chmod(0o755)
        else:
            added.symlink_to(sys.executable)
        return added

    def _env(self, chosen: str | Path) -> dict[str, str]:
        env = {"PATH": str(self.path), "SHIV_ROOT": str(self._host.cache)}
        return env | ({"LIVENESSPROBE_PYTHON": str(chosen)} if chosen else {})

    def run(self, chosen: str | Path = "", before: Sequence[str | Path] = ()) -> None:
        self._host.runs(self.file, before=before, env=self._env(chosen))

    def refuse(self, chosen: str | Path = "") -> str:
        return self._host.refuses(self.file, env=self._env(chosen))


@pytest.fixture
def pythons(host: Host, folder: Path) -> Pythons:
    return Pythons(host, folder)


def test_the_system_s_python_comes_first(pythons: Pythons) -> None:
    pythons.add(pythons.usual, "python3")
    pythons.add(pythons.path, "python3", "#!/bin/sh\necho wrong\n")

    pythons.run()


def test_a_shim_that_does_not_start_is_passed_over(pythons: Pythons) -> None:
    for place in (pythons.usual, pythons.path):
        pythons.add(place, "python3", SHIM)
    pythons.add(pythons.path, f"python{HERE}")

    pythons.run()


@pytest.mark.parametrize("shell", SHELLS)
def test_any_shell_finds_a_python(pythons: Pythons, shell: str) -> None:
    pythons.add(pythons.usual, "python3", SHIM)
    pythons.add(pythons.path, f"python{HERE}")
    program, *arguments = shell.split()

    pythons.run(before=[shutil.which(program) or program, *arguments])


@pytest.mark.parametrize("call", ["faccessat2", "fstatfs"])
def test_a_profile_that_denies_a_question_is_no_reason_not_to_start(host: Host, call: str) -> None:
    """Whether a file may be run, and whether a volume is mounted noexec."""
    host.runs(before=denying(call))


def test_a_shim_that_starts_is_taken(pythons: Pythons) -> None:
    pythons.add(pythons.path, "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')

    pythons.run()


def test_what_was_tried_is_told(pythons: Pythons) -> None:
    shims = [pythons.add(place, "python3", SHIM) for place in (pythons.usual, pythons.path)]

    line = pythons.refuse()

    assert f"fits: {shims[0]} (does not start), {shims[1]} (does not start). Install CPython " in line
    assert line.endswith("or set LIVENESSPROBE_PYTHON to the path of one\n")


def test_a_python_that_does_not_fit_is_passed_over(host: Host, builds: dict[str, Path]) -> None:
    line = host.refuses(builds["python"], env={"PATH": "/nowhere"})

    assert re.search(rf"fits: \S+/python3 \(CPython {HERE}\)", line)


if OLD:

    @pytest.mark.parametrize("old", OLD)
    def test_the_search_goes_on_after_an_old_python(pythons: Pythons, old: str) -> None:
        real = subprocess.run(
            [f"python{old}", "-c", "import sys; print(sys.executable)"],
            capture_output=True,
            check=True,
            text=True,
        )
        (pythons.usual / "python3").symlink_to(real.stdout.strip())
        pythons.add(pythons.path, "python3", SHIM)
        line = pythons.refuse()
        assert (
            f"fits: {pythons.usual}/python3 (CPython {old}), {pythons.path}/python3 (does not start). "
            in line
        )

        pythons.add(pythons.path, f"python{HERE}")

        pythons.run()


def test_the_chosen_python_decides(pythons: Pythons) -> None:
    chosen = pythons.add(pythons.path, "chosen")

    pythons.run(chosen)
    pythons.run("chosen")
    assert pythons.refuse("/nowhere/python3").endswith(
        "LIVENESSPROBE_PYTHON=/nowhere/python3: there is no such program\n"
    )


def test_a_chosen_python_that_does_not_fit_is_an_error(host: Host, builds: dict[str, Path]) -> None:
    env = {"LIVENESSPROBE_PYTHON": sys.executable, "SHIV_ROOT": str(host.cache)}

    assert f"{sys.executable} is CPython {HERE}" in host.refuses(builds["python"], env=env)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_looks_for_a_python_ends_it_well(
    pythons: Pythons, folder: Path, number: signal.Signals
) -> None:
    asked, answered = folder / "asked", folder / "answered"
    os.mkfifo(asked)
    os.mkfifo(answered)
    pythons.add(pythons.path, "python3", f"#!/bin/sh\necho >{asked}\nread line <{answered}\nexit 1\n")
    env = {"PATH": str(pythons.path)}
    # A shell that runs in the background ignores this one, which no trap can change.
    heard = "import os, signal, sys; signal.signal(int(sys.argv[1]), signal.SIG_DFL); os.execv(sys.argv[2], sys.argv[2:])"
    command = [sys.executable, "-c", heard, str(int(number)), str(pythons.file)]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as start:
        asked.read_text()
        start.send_signal(number)
        answered.write_text("\n")
        _, errors = start.communicate(timeout=60)

    assert (start.returncode, errors) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_python_reads_the_start_ends_it_like_any_other(
    host: Host, folder: Path, number: signal.Signals
) -> None:
    host.runs()
    content = host.file.read_bytes()
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    env = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(host.cache)}
    heard = "import os, signal, sys; signal.signal(int(sys.argv[1]), signal.SIG_DFL); os.execv(sys.argv[2], sys.argv[2:])"
    command = [sys.executable, "-c", heard, str(int(number)), "/bin/sh", str(pipe), "--health-port=0"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as start:
        pipe.write_bytes(content[: content.index(b"PK\3\4")])
        end = time.monotonic() + 60
        process = Path("/proc", str(start.pid))
        # Asleep, Python waits for who writes; before, it may still be the shell that has the pipe open.
        while not (b"-IS" in (process / "cmdline").read_bytes() and ") S " in (process / "stat").read_text()):
            assert time.monotonic() < end
        with pipe.open("wb") as read_by_python:
            start.send_signal(number)
            read_by_python.write(content[:16384])
        _, errors = start.communicate(timeout=60)

    assert start.returncode == 0, errors
    assert all(re.match(r"[IWE]\d{4} ", line) for line in errors.splitlines()), errors


def test_a_check_that_is_ended_before_it_began_is_not_taken_for_a_healthy_one(pythons: Pythons) -> None:
    pythons.add(pythons.path, "python3", "#!/bin/sh\nkill -TERM $PROBE\nexit 1\n")
    command = ["/bin/sh", "-c", 'PROBE=$$ exec "$0" --once', str(pythons.file)]
    done = subprocess.run(command, env={"PATH": str(pythons.path)}, check=False, capture_output=True)

    assert done.returncode == -signal.SIGTERM


# ---- hosts that don't


def test_another_python_is_told_what_fits(host: Host, builds: dict[str, Path]) -> None:
    line = host.refuses(builds["python"], before=[sys.executable])

    assert f"packed for CPython {OTHER} on x86_64" in line
    assert f"{sys.executable} is CPython {HERE}" in line
    assert (
        f"run it with python{OTHER}, or build one that fits: make livenessprobe PYTHON_VERSION={HERE} "
        in line
    )


def test_another_machine_is_told_what_fits(host: Host, builds: dict[str, Path]) -> None:
    line = host.refuses(builds["machine"], before=[sys.executable])

    assert f"packed for CPython {OTHER} on aarch64" in line
    assert line.endswith(
        f": build one that fits: make livenessprobe PYTHON_VERSION={HERE} PLATFORM=linux/amd64\n"
    )


if OLD:

    @pytest.mark.parametrize("old", OLD)
    def test_an_old_python_at_hand_is_told_what_fits(host: Host, old: str) -> None:
        line = host.refuses(before=[f"python{old}"])

        assert f"packed for CPython 3.10 or newer on {os.uname().machine}, but " in line
        assert line.endswith(": run it with python3.10\n")


def test_start_has_only_syntax_of_python_2_7_as_well() -> None:
    newer = (
        ast.AnnAssign,
        ast.JoinedStr,
        ast.NamedExpr,
        ast.Nonlocal,
        ast.Match,
        ast.AsyncFunctionDef,
    )
    product = ROOT / "build" / "product"
    sources = [ast.parse((product / name).read_text()) for name in ("start.py", "misfit.py")]
    for node in (node for source in sources for node in ast.walk(source)):
        assert not isinstance(node, newer), ast.unparse(node)
        assert not getattr(node, "annotation", None), ast.unparse(node)
        assert not getattr(node, "returns", None), ast.unparse(node)
        assert not getattr(node, "kwonlyargs", None), ast.unparse(node)


def test_a_host_without_python_is_told_what_to_install(pythons: Pythons) -> None:
    line = pythons.refuse()

    assert line.startswith("livenessprobe: no Python here fits. Install CPython ")
    assert "apt-get install python3" in line


def test_a_file_that_was_cut_short_says_so(host: Host, folder: Path) -> None:
    short = folder / "short"
    short.write_bytes(FILE.read_bytes()[:-1000])
    short.chmod(0o755)

    assert host.refuses(short) == f"livenessprobe: {short} is damaged: copy it here again\n"
    done = host.start(short, before=[sys.executable])
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r".*livenessprobe-is-damaged--copy-it-here-again\n", done.stderr)


def test_a_file_that_is_still_being_copied_is_never_a_success(host: Host, folder: Path) -> None:
    """Wherever it ends, from the third line on: a check by such a file must not be taken for a healthy driver's."""
    whole = FILE.read_bytes()
    start = whole.index(b"PK\3\4")
    end = whole.index(b"PK\3\4", start + 1)
    short = folder / "short"
    for size in [whole.index(b"{ #") + 1, *range(256, start, 256), start, *range(start, end, 1024), end]:
        short.write_bytes(whole[:size])
        done = host.start(short, "--once", before=["/bin/sh"])

        assert done.returncode, size
        assert "Traceback" not in done.stderr
        assert start > size or done.stderr == f"livenessprobe: {short} is damaged: copy it here again\n"


def test_a_file_with_a_wrong_byte_says_so(host: Host, folder: Path) -> None:
    name = "site-packages/livenessprobe/serve.py"
    with zipfile.ZipFile(FILE) as archive:
        there = archive.getinfo(name).header_offset
    whole = FILE.read_bytes()
    listed = whole.rindex(name.encode()) - 46  # in the list of all, behind which the name stands
    wrong = folder / "wrong"
    # In what is compressed, the version it takes to read it, whether it is encrypted, how it is compressed.
    for place in (there + 200, listed + 6, listed + 8, listed + 10):
        content = bytearray(whole)
        content[place] ^= 0x41
        wrong.write_bytes(content)
        wrong.chmod(0o755)

        assert f"{wrong} is damaged" in host.refuses(wrong)
        assert host.refuses(wrong), "it must not have left a cache that counts as whole"


# ---- caches that can't be used


@pytest.mark.parametrize("use", ["missing", "there", "file"])
def test_unwritable_cache(host: Host, folder: Path, use: str) -> None:
    cache = folder / "closed" / "cache"
    cache.parent.mkdir()
    if use == "there":
        cache.mkdir()
        cache.chmod(0o555)
    elif use == "file":
        cache.touch()
    cache.parent.chmod(0o555)

    line = host.refuses(env={"SHIV_ROOT": str(cache)}, user=NOBODY if AS_ROOT else None)

    reason = "Not a directory" if use == "file" else "Permission denied"
    assert f"cannot unpack into {cache} ({reason})" in line
    assert "set SHIV_ROOT to a folder you can write to" in line


def test_no_home_and_no_scratch_folder_names_both(host: Host) -> None:
    line = host.refuses(
        env={"HOME": "/proc/1", "TMPDIR": "/proc/1/scratch"}, user=NOBODY if AS_ROOT else None
    )

    assert "cannot unpack into /proc/1/.shiv (" in line
    assert "), nor into /proc/1/scratch/shiv-" in line


def test_full_cache(host: Host) -> None:
    host.cache.mkdir()
    line = host.refuses(before=in_namespace('mount -t tmpfs -o size=600k none "$1"', host.cache))

    assert f"cannot unpack into {host.cache} (No space left on device)" in line


def test_cache_over_its_quota_is_left_empty(host: Host) -> None:
    limit = 300_000

    line = host.refuses(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))

    assert f"cannot unpack into {host.cache} (File too large)" in line
    assert not [path for path in host.cache.rglob("*") if path.is_file()]


def test_too_little_memory_to_unpack(host: Host) -> None:
    line = host.refuses(before=["/bin/sh", "-c", 'ulimit -v 32768; exec "$@"', "sh"])

    assert f"cannot unpack into {host.cache} (out of memory)" in line


def test_out_of_memory_is_not_taken_for_damage(host: Host) -> None:
    """Whatever is being loaded at that moment; with less, Python itself does not start."""
    for kib in range(5000, 9000, 250):
        done = host.start(before=["/bin/sh", "-c", f'ulimit -d {kib}; exec "$@"', "sh"])

        assert "damaged" not in done.stderr, kib
        assert done.returncode == 1


def test_noexec_cache(host: Host) -> None:
    host.cache.mkdir()
    line = host.refuses(before=in_namespace('mount -t tmpfs -o noexec none "$1"', host.cache))

    assert f"cannot unpack into {host.cache} (mounted noexec)" in line


def test_cache_that_became_noexec(host: Host) -> None:
    host.runs()
    noexec = 'mount --bind "$1" "$1"; mount -o remount,bind,noexec "$1"'

    assert "(mounted noexec)" in host.refuses(before=in_namespace(noexec, host.cache))


@pytest.fixture
def other_user() -> int:
    if not AS_ROOT:
        pytest.skip("only root can give files away")
    return NOBODY


def make_evil(folder: Path) -> None:
    """Put code that ends the program into an unpacked folder, with a checksum as valid as what was there."""
    for path in folder.glob("cpython*"):
        code = marshal.dumps(compile("raise SystemExit('evil')", "evil", "exec"))
        content = len(code).to_bytes(4, "little") + code
        path.write_bytes(content + zlib.adler32(content).to_bytes(4, "little"))


def test_code_that_another_user_owns_is_not_run(host: Host, other_user: int) -> None:
    host.runs()
    (folder,) = host.cache.iterdir()
    make_evil(folder)
    assert host.start().stderr == "evil\n", "this is code that runs, where it is root's"
    for owned in (folder, next(folder.glob("cpython*"))):
        os.chown(owned, other_user, other_user)

        host.runs()

        assert sorted(path.name for path in host.cache.iterdir()) == [folder.name, "shiv-0"]
        os.chown(owned, 0, 0)


def test_root_leaves_another_user_s_folders_alone(host: Host, folder: Path, other_user: int) -> None:
    home, scratch = folder / "home", folder / "scratch"
    for path in (home, scratch):
        path.mkdir()
    (home / "mine").mkdir()  # as if root had been here before
    os.chown(home, other_user, other_user)

    host.runs(env={"HOME": str(home), "TMPDIR": str(scratch)})
    assert [path.name for path in scratch.iterdir()] == ["shiv-0"]
    for chosen in (home, home / "mine", home / "new"):
        line = host.refuses(env={"SHIV_ROOT": str(chosen)})
        assert f"cannot unpack into {chosen} ({home} belongs to another user)" in line
    assert [path.name for path in home.iterdir()] == ["mine"]


@pytest.mark.parametrize(("mode", "trusted"), [(0o777, False), (0o775, False), (0o1777, True), (0o755, True)])
def test_a_folder_above_that_others_can_write_to_must_be_sticky(host: Host, mode: int, trusted: bool) -> None:
    above = host.cache
    above.mkdir()
    above.chmod(mode)
    env = {"SHIV_ROOT": str(above / "cache")}

    if trusted:
        host.runs(env=env)
    else:
        assert f"(other users can write to {above})" in host.refuses(env=env)


def test_a_volume_open_to_all_is_used_but_nothing_that_others_put_there(
    host: Host, folder: Path, other_user: int
) -> None:
    host.cache.mkdir()
    host.cache.chmod(0o777)  # as Kubernetes makes an emptyDir
    host.runs()
    (ours,) = host.cache.iterdir()
    evil = Path(shutil.copytree(ours, folder / "evil"))
    make_evil(evil)
    for path in (evil, *evil.iterdir()):
        os.chown(path, other_user, other_user)
    evil.rename(host.cache / "evil")
    # It keeps putting its own folder in place of ours.
    exchange = "import os\nos.setuid({1})\nwhile True:\n for old, new in (('{0}', 'x'), ('evil', '{0}'), ('{0}', 'evil'), ('x', '{0}')):\n  try: os.rename(old, new)\n  except OSError: pass"
    # Changes to that user only once it runs, since this Python may be in root's home.
    attack = [sys.executable, "-c", exchange.format(ours.name, other_user)]
    with subprocess.Popen(attack, cwd=host.cache) as attacker:
        try:
            for _ in range(20):
                done = host.start()
                assert VERSION.fullmatch(done.stdout) or done.stderr.startswith(
                    "livenessprobe: cannot unpack into "
                ), done
        finally:
            attacker.kill()


def test_code_where_another_user_could_exchange_it_is_not_run(
    host: Host, folder: Path, other_user: int
) -> None:
    host.runs()
    private = host.cache.rename(folder / "shiv-0")
    os.chown(private, other_user, other_user)

    line = host.refuses(env={"HOME": "/proc", "TMPDIR": str(folder)})

    assert f"{private} ({private} belongs to another user)" in line


def test_a_folder_open_to_all_is_not_trusted(host: Host) -> None:
    host.runs()
    (folder,) = host.cache.iterdir()
    folder.chmod(0o777)

    host.runs()

    assert sorted(path.name for path in host.cache.iterdir()) == [folder.name, f"shiv-{os.geteuid()}"]
