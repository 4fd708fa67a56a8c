"""The packed file: its bytes, its content, and how it starts on hosts that fit, that don't, or that are hostile."""

import ast
import marshal
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from shiv.bootstrap.environment import Environment

ROOT = Path(__file__).parent.parent
FILE = ROOT / "bin" / "livenessprobe"
HERE = "{}.{}".format(*sys.version_info)
OTHER = "3.12" if HERE == "3.13" else "3.13"
NOBODY = 65534
AS_ROOT = os.geteuid() == 0
VERSION = re.compile(r"livenessprobe \S+ \(Python \S+, grpcio \S+\)\n")


class Host:
    """Starts a packed file in an environment with nothing but PATH and what a test adds."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        # Copied here, as to a host; also, not every user may enter the folder of this checkout.
        self.file = Path(shutil.copy(FILE, folder))

    def start(
        self,
        file: Path | None = None,
        *,
        before: Sequence[str | Path] = (),
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """`before` goes before the file on the command line; `env` replaces the cache folder of this host."""
        return subprocess.run(
            [*before, file or self.file, "--version"],
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

    def refuses(self, file: Path | None = None, **options: Any) -> str:
        """It says one line and exits with 1; the line."""
        done = self.start(file, **options)

        assert (done.returncode, done.stdout) == (1, ""), done
        assert re.fullmatch("livenessprobe: .*\n", done.stderr), done.stderr
        return done.stderr


@pytest.fixture
def host(folder: Path) -> Host:
    return Host(folder)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files packed at the same time, each from its own copy of the sources, with different habits of the builder."""
    targets = {
        "first": ([], 0o022),
        "second": ([], 0o077),
        "python": (["--python-version", OTHER, "--platform", "linux/amd64"], 0o022),
        "machine": (["--python-version", OTHER, "--platform", "linux/arm64"], 0o022),
    }
    made, running = {}, []
    for name, (options, umask) in targets.items():
        copy = tmp_path_factory.mktemp(name)
        shutil.copy(ROOT / "LICENSE", copy)
        for part in ("build", "livenessprobe"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        made[name] = copy / "out" / "file"
        command = [sys.executable, "build/here/pyz.py", *options, "out/file"]
        running.append(subprocess.Popen(command, cwd=copy, umask=umask))
    assert [process.wait() for process in running] == [0, 0, 0, 0]
    return made


def in_namespace(mounts: str, *arguments: str | Path) -> list[str | Path]:
    """What to put before a command so that it sees mounts of its own, which end with it."""
    unshare = ["unshare", "--mount"] if AS_ROOT else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run(
        [*unshare, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    ).returncode:
        pytest.skip("this sandbox lets nobody mount a file system")
    return [*unshare, "sh", "-ec", f'{mounts}; shift {len(arguments)}; exec "$@"', "sh", *arguments]


# ---- what is packed


def test_same_sources_give_the_same_bytes(builds: dict[str, Path]) -> None:
    first = builds["first"].read_bytes()

    assert first == builds["second"].read_bytes()
    assert first == FILE.read_bytes(), "bin/livenessprobe is not of these sources: make livenessprobe"
    assert stat.S_IMODE(builds["second"].stat().st_mode) == 0o755
    with zipfile.ZipFile(FILE) as archive:
        names = archive.namelist()
    assert names == sorted(names), "in an order that no file system has a say in"


def test_is_small() -> None:
    assert FILE.stat().st_size <= 7_600_000


@pytest.mark.parametrize(("name", "machine", "elf"), [("python", "x86_64", 62), ("machine", "aarch64", 183)])
def test_packs_for_another_python_and_machine(
    builds: dict[str, Path], name: str, machine: str, elf: int
) -> None:
    with zipfile.ZipFile(builds[name]) as archive:
        modules = {Path(path).name: archive.read(path) for path in archive.namelist() if path.endswith(".so")}

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


def test_everything_is_compiled_at_the_first_start(host: Host) -> None:
    host.runs(env={"SHIV_ROOT": str(host.cache), "PYTHONDONTWRITEBYTECODE": "1"})
    sources = list(host.cache.rglob("*.py"))

    assert len(sources) > 100
    for source in sources:
        (compiled,) = source.parent.glob(f"__pycache__/{source.stem}.*.pyc")
        content = compiled.read_bytes()
        # PEP 552: by a hash that is not checked, so that no change of the files' times makes each start compile anew.
        assert content[4:8] == b"\1\0\0\0"
        assert marshal.loads(content[16:]).co_filename == str(source)


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


def test_what_a_killed_first_start_left_is_made_whole(host: Host) -> None:
    host.runs()
    (folder,) = host.cache.iterdir()
    whole = next(folder.rglob("cygrpc*.so"))
    size = whole.stat().st_size
    os.truncate(whole, 4096)
    folder.rename(f"{folder}.part-{os.geteuid()}")

    host.runs()

    assert whole.stat().st_size == size
    assert list(host.cache.iterdir()) == [folder]


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


def test_nothing_installed_on_the_host_gets_in_the_way(host: Host, folder: Path) -> None:
    for name in ("grpc", "livenessprobe", "google", "typing_extensions", "http"):
        (folder / "evil" / name).mkdir(parents=True)
        (folder / "evil" / name / "__init__.py").write_text("raise SystemExit('evil')")
    env = {"SHIV_ROOT": str(host.cache), "PYTHONPATH": str(folder / "evil")}

    host.runs(env=env)
    host.runs(env=env, before=[sys.executable])


def test_switches_of_shiv_still_work(host: Host) -> None:
    env = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(host.cache), "SHIV_INTERPRETER": "1"}
    code = "import grpc; print(grpc.__file__)"
    done = subprocess.run([FILE, "-c", code], env=env, capture_output=True, check=True, text=True, timeout=60)

    assert done.stdout.startswith(str(host.cache))


def test_they_are_all_known_and_nothing_else_is_taken_for_one(host: Host) -> None:
    switches = {name for key, name in vars(Environment).items() if key.isupper()} - {Environment.ROOT}
    with zipfile.ZipFile(FILE) as archive:
        [names] = re.findall(r"(?ms)^SWITCHES = (\(.*?\n\))", archive.read("__main__.py").decode())
    assert {f"SHIV_{name}" for name in ast.literal_eval(names).split()} == switches

    # As in a namespace with a service named shiv.
    service = {"SHIV_SERVICE_HOST": "10.0.0.1", "SHIV_PORT": "tcp://10.0.0.1:80"}
    host.runs(env={"SHIV_ROOT": str(host.cache), **service})
    assert not list(host.cache.rglob("*_lock"))


# ---- which Python

SHIM = "#!/bin/sh\necho 'pyenv: no such version' >&2\nexit 127\n"


class Pythons:
    """A host whose Pythons are those that a test puts into its folders, which stand for /usr/bin and for PATH."""

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
        """The Python of this test by another name, or a script."""
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

    def run(self, chosen: str | Path = "") -> None:
        self._host.runs(self.file, env=self._env(chosen))

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

    assert re.search(rf"fits: \S+/python3 \(Python {HERE}\)", line)


def test_the_search_goes_on_after_an_old_python(pythons: Pythons) -> None:
    old = [name for name in ("3.6", "3.7", "3.8", "3.9") if starts(f"python{name}")]
    if not old:
        pytest.skip("there is no Python 3.6 to 3.9 here")
    real = subprocess.run(
        [f"python{old[0]}", "-c", "import sys; print(sys.executable)"],
        capture_output=True,
        check=True,
        text=True,
    )
    (pythons.usual / "python3").symlink_to(real.stdout.strip())
    pythons.add(pythons.path, "python3", SHIM)
    line = pythons.refuse()
    assert (
        f"fits: {pythons.usual}/python3 (Python {old[0]}), {pythons.path}/python3 (does not start). " in line
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

    assert f"{sys.executable} is Python {HERE}" in host.refuses(builds["python"], env=env)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_looks_for_a_python_ends_it_well(
    pythons: Pythons, folder: Path, number: signal.Signals
) -> None:
    asked, answered = folder / "asked", folder / "answered"
    os.mkfifo(asked)
    os.mkfifo(answered)
    pythons.add(pythons.path, "python3", f"#!/bin/sh\necho >{asked}\nread line <{answered}\nexit 1\n")
    env = {"PATH": str(pythons.path)}
    with subprocess.Popen([pythons.file], env=env, stderr=subprocess.PIPE, text=True) as start:
        asked.read_text()
        start.send_signal(number)
        answered.write_text("\n")
        _, errors = start.communicate(timeout=60)

    assert (start.returncode, errors) == (0, "")


def test_a_check_that_is_ended_before_it_began_is_not_taken_for_a_healthy_one(pythons: Pythons) -> None:
    pythons.add(pythons.path, "python3", "#!/bin/sh\nkill -TERM $PROBE\nexit 1\n")
    command = ["/bin/sh", "-c", 'PROBE=$$ exec "$0" --once', str(pythons.file)]
    done = subprocess.run(command, env={"PATH": str(pythons.path)}, check=False, capture_output=True)

    assert done.returncode == -signal.SIGTERM


# ---- hosts that don't


def test_another_python_is_told_what_fits(host: Host, builds: dict[str, Path]) -> None:
    line = host.refuses(builds["python"], before=[sys.executable])

    assert f"packed for CPython {OTHER} on x86_64" in line
    assert f"{sys.executable} is Python {HERE}" in line
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


def starts(python: str) -> bool:
    return not subprocess.run(
        ["sh", "-c", f"{python} --version"], capture_output=True, check=False
    ).returncode


def test_every_other_python_at_hand_is_told_what_fits(host: Host) -> None:
    for name in ["python2.7", *(f"python3.{minor}" for minor in range(4, 20))]:
        if name != f"python{HERE}" and starts(name):
            assert f"run it with python{HERE}" in host.refuses(before=[name])


def test_start_has_only_syntax_of_python_2_7_as_well() -> None:
    newer = (
        ast.AnnAssign,
        ast.JoinedStr,
        ast.NamedExpr,
        ast.Nonlocal,
        ast.Match,
        ast.AsyncFunctionDef,
    )
    for node in ast.walk(ast.parse((ROOT / "build" / "product" / "start.py").read_text())):
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

    for before in ([], [sys.executable]):
        done = host.start(short, before=before)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r".*livenessprobe-is-damaged--copy-it-here-again\n", done.stderr)


def test_a_file_with_a_wrong_byte_says_so(host: Host, folder: Path) -> None:
    content = bytearray(FILE.read_bytes())
    content[len(content) // 2] ^= 1
    wrong = folder / "wrong"
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
    line = host.refuses(before=in_namespace('mount -t tmpfs -o size=1m none "$1"', host.cache))

    assert f"cannot unpack into {host.cache} (No space left on device)" in line


def test_cache_over_its_quota_is_left_empty(host: Host) -> None:
    limit = 1_000_000

    line = host.refuses(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))

    assert f"cannot unpack into {host.cache} (File too large)" in line
    assert not [path for path in host.cache.rglob("*") if path.is_file()]


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


def test_code_of_another_user_is_not_run(host: Host, other_user: int) -> None:
    host.runs()
    (folder,) = host.cache.iterdir()
    next(folder.rglob("livenessprobe/__main__.py")).write_text("raise SystemExit('evil')")
    shutil.rmtree(next(folder.rglob("livenessprobe/__pycache__")))
    os.chown(folder, other_user, other_user)

    host.runs()

    assert sorted(path.name for path in host.cache.iterdir()) == [folder.name, "shiv-0"]


def test_code_where_another_user_could_exchange_it_is_not_run(
    host: Host, folder: Path, other_user: int
) -> None:
    host.runs()
    private = host.cache.rename(folder / "shiv-0")
    os.chown(private, other_user, other_user)

    line = host.refuses(env={"HOME": "/proc", "TMPDIR": str(folder)})

    assert f"{private} (another user may have written there)" in line


def test_a_folder_open_to_all_is_not_trusted(host: Host) -> None:
    host.runs()
    (folder,) = host.cache.iterdir()
    folder.chmod(0o777)

    host.runs()

    assert sorted(path.name for path in host.cache.iterdir()) == [folder.name, f"shiv-{os.geteuid()}"]
