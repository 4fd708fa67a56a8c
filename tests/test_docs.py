"""The pages tell the truth: their tables match the program, the sources and the Makefile."""

from __future__ import annotations

import ast
import html
import os
import re
import shlex
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import fake_driver
import peers
import program
import pytest
import test_fuzz
import verdicts
from fake_driver import FakeDriver
from prometheus_client.parser import text_string_to_metric_families

from livenessprobe import __version__, config
from livenessprobe.config import Exit

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from conftest import ProbeFactory

ROOT = program.ROOT
PACKAGE = ROOT / "livenessprobe"
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part == "node_modules" for part in path.relative_to(ROOT).parts)
)
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
KUBERNETES = (ROOT / "docs" / "kubernetes.md").read_text()
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()

# Where the log's messages come from: a logger's methods, with their letters where we use them, and, for one that
# overtakes others, a record.
LOGGED_AT_0 = {"info": "I", "warning": "W", "error": "E", "critical": "F"} | dict.fromkeys(
    ("debug", "exception", "fatal"), "none"
)
MESSAGE_OF_RECORD = 4


def table(page: str, *head: str) -> list[list[str]]:
    """The rows of the table with these heads; a cell that is nothing but `code` comes without its ticks."""
    lines = page.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line == f"| {' | '.join(head)} |"]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        row = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert len(row) == len(head), f"not {len(head)} cells: {line}"
        rows.append([re.sub(r"^`([^`]*)`$", r"\1", cell) for cell in row])
    assert rows, head
    return rows


def column(page: str, *head: str) -> list[str]:
    return [row[0] for row in table(page, *head)]


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page)


# ---- flags and exit codes


def test_flags_are_those_of_the_program() -> None:
    rows = [
        (f"`{flag.name}`", f"`{flag.default}`" if flag.default else "", flag.usage.replace("|", r"\|"))
        for flag in config.FLAGS
    ]
    expected = "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)

    assert f"| flag | default | meaning |\n|---|---|---|\n{expected}\n\n" in REFERENCE, f"write:\n{expected}"


def test_exit_codes_are_those_of_the_program() -> None:
    codes = column(REFERENCE, "exit", "serving", "with `--once`")

    assert codes == [str(int(code)) for code in Exit]


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "CHANGELOG.md", "docs/kubernetes.md", "docs/metrics.md"),
        *("docs/migration.md", "docs/operations.md", "docs/reference.md", "docs/troubleshooting.md"),
    ],
)
def test_flags_in_the_text_exist(page: str) -> None:
    # In ticks, and beginning with a dash: `--csi-address=/csi/csi.sock`, `-v=5`.
    named = set(re.findall(r"`--?([a-zA-Z][\w-]*)[^`]*`", (ROOT / page).read_text()))

    assert named
    assert named <= {flag.name for flag in config.FLAGS} | {"h"}


@pytest.mark.parametrize("page", [README, KUBERNETES], ids=["README", "kubernetes"])
def test_arguments_of_the_manifest_are_accepted_without_a_warning(page: str) -> None:
    manifest, *_ = code_blocks(page, "yaml")
    sidecar = manifest.partition("name: liveness-probe")[2]
    arguments = re.findall(r"--[^\s,\]]+", sidecar)

    accepted = config.parse(arguments)

    assert accepted.socket_path == "/csi/csi.sock"
    assert not accepted.warnings
    # The kubelet must not give up before the check ends.
    timeouts = [int(seconds) for seconds in re.findall(r"timeoutSeconds: (\d+)", manifest)]
    assert timeouts
    assert min(timeouts) >= accepted.probe_timeout


def test_arguments_of_the_exec_probe_are_accepted() -> None:
    found = re.search(r"command: \[/livenessprobe, (.*)\]\n +timeoutSeconds: (\d+)", KUBERNETES)
    assert found

    accepted = config.parse(found[1].split(", "))

    assert accepted.once
    assert int(found[2]) > accepted.connection_timeout + accepted.probe_timeout


# ---- endpoints, verdicts, metrics: of the program beside a driver


def test_endpoints_are_what_is_served(driver: FakeDriver, probe: program.Probe) -> None:
    rows = table(REFERENCE, "path", "healthy", "not ready", "unhealthy")
    served = probe.wait_for_log(r'"Serving".* paths="([^"]*)"')[1].split()

    seen: dict[str, list[str]] = {path: [] for path in served}
    for behaviour in ("ready", "not-ready", "error"):
        driver.set(behaviour)
        for path in served:
            seen[path].append(str(probe.get(path).status))

    assert {path: statuses for path, *statuses in rows} == seen


def test_statusz_looks_as_shown(driver: FakeDriver, probe: program.Probe) -> None:
    [shown] = [block for block in code_blocks(TROUBLESHOOTING, "text") if "statusz" in block]
    probe.get()
    driver.set("error", message="the disk is gone")
    probe.get()

    served = probe.get("/statusz").text

    labels, changes = r"(?m)^([A-Z][A-Za-z ]+):", r"(?m)UTC \d{4}  (.*)$"
    assert re.findall(labels, served) == re.findall(labels, shown)
    assert re.findall(changes, served) == re.findall(changes, shown)


Case: TypeAlias = "Callable[[FakeDriver, ExitStack], object]"


def _told(behaviour: fake_driver.Behaviour, **details: Any) -> Case:
    return lambda driver, ends: driver.start().set(behaviour, **details)


def _peer(peer: peers.Peer) -> Case:
    return lambda driver, ends: ends.enter_context(peer(Path(driver.target)))


# In the order of the table.
CASES: dict[str, Case] = {
    "ready": _told("ready"),
    "not ready": _told("not-ready"),
    "error": _told("error", message="broken"),
    "unimplemented": _told("unimplemented"),
    "undecodable": _told("raw", data=fake_driver.UNDECODABLE["no message at all"]),
    "no message": _peer(test_fuzz.status_alone),
    "too long": _told("error", message="x" * 1_200_000),
    "hang": _told("hang"),
    "stopped": lambda driver, ends: driver.start().pause(),
    "closes": _peer(peers.settings_then_close),
    "not gRPC": _peer(verdicts.CASES["HTTP 404"].peer),
    "missing": lambda driver, ends: None,
    "stale": _peer(peers.stale_socket),
    "full": _peer(peers.never_accepting),
    "forbidden": _peer(peers.forbidden),
    "file": _peer(peers.regular_file),
    "closes at once": _peer(verdicts.CASES["closed before a word"].peer),
    "no HTTP/2": _peer(peers.http1),
}


@pytest.mark.parametrize(("row", "case"), list(enumerate(CASES)), ids=list(CASES))
def test_verdicts_are_those_of_the_program(row: int, case: str, socket_path: Path) -> None:
    rows = table(REFERENCE, "the driver", "verdict", "exit", "text")
    assert len(rows) == len(CASES), "a row without a case, or a case without a row"
    _, verdict, code, text = rows[row]
    shown = re.search("`([^`]*)`", f"`{text}`" if "`" not in text else text)
    assert shown
    pattern = ".*".join(map(re.escape, shown[1].split("…")))
    timeout = 2 if case in ("hang", "stopped", "full") else 20
    flags = [f"--csi-address={socket_path}", f"--probe-timeout={timeout}s", "--connection-timeout=0s"]
    # As root we may use any socket.
    user = program.unprivileged() if case == "forbidden" else None

    with ExitStack() as ends:
        driver = FakeDriver(socket_path)
        ends.callback(driver.kill)
        CASES[case](driver, ends)
        once = program.run_once([*flags, "--once"], user=user)
        probe = ends.enter_context(program.Probe([*flags, "--http-endpoint=127.0.0.1:0"], user=user))
        probe.get()
        # The second time, since some things show only after a failure.
        answer = probe.get()

    assert re.fullmatch(pattern, answer.text)
    assert answer.status == (200 if verdict == "healthy" else 500)
    assert once.returncode == int(code)
    assert case == "stopped" or re.fullmatch(pattern, once.stdout.removesuffix("\n"))


def test_metrics_are_those_of_the_program(driver: FakeDriver, probe: program.Probe) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = table(page, "metric", "type", "meaning")
    for behaviour in ("ready", "error"):
        driver.set(behaviour)
        probe.get()

    families = text_string_to_metric_families(probe.get("/metrics").text)
    exported = {
        family.name + ("_total" if family.type == "counter" else ""): family.type for family in families
    }

    assert {name: kind for name, kind, _ in rows} == exported


# ---- the log


def _literals(attributes: Collection[str], position: int) -> Iterator[tuple[str, ast.expr]]:
    """The file, and the argument at this position, of each call in the package to a method with one of these names."""
    # In a module that does not log, such a method belongs to something else, such as a metric.
    for path in sorted(path for path in PACKAGE.glob("*.py") if "import logging" in path.read_text()):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in attributes and len(node.args) > position:
                yield path.name, node.args[position]


def _messages(attributes: Collection[str], position: int) -> set[str]:
    return {
        argument.value
        for _, argument in _literals(attributes, position)
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }


def _explained() -> list[tuple[str, str]]:
    """Each message of the log with its severity, or the verbosity it is written from."""
    rows = table(REFERENCE, "message", "severity", "meaning", "cause", "what to do")
    assert all(row[-1] for row in rows)
    return [(row[0], row[1]) for row in rows]


def test_messages_of_the_log_are_explained(probe_factory: ProbeFactory, socket_path: Path) -> None:
    # The warnings about flags are data in the sources, so ask the program for them.
    old = [f"--{flag.name}=1" for flag in config.FLAGS if flag.usage.startswith("Of older releases")]
    address = f"--csi-address={socket_path}"
    lines = [
        *probe_factory("--http-endpoint=127.0.0.1:0", "--health-port=9808", address, *old).log_lines,
        *probe_factory("--health-port=0", address, "--metrics-path=/").log_lines,
    ]
    warnings = {(line[0], line.split('"')[1]) for line in lines} - {("I", "Serving")}
    assert len(warnings) == 3

    explained = [(severity, text) for text, severity in _explained() if not severity.startswith("-v")]
    written = {(letter, text) for name, letter in LOGGED_AT_0.items() for text in _messages({name}, 0)}
    written |= {("W", text) for text in _messages({"LogRecord"}, MESSAGE_OF_RECORD)} | warnings

    assert sorted(explained) == sorted(written)


def test_messages_of_a_verbose_log_are_explained() -> None:
    explained = [message for message, from_level in _explained() if from_level.startswith("-v")]

    assert sorted(explained) == sorted(_messages({"log"}, 1))


def test_no_message_escapes_these_tests() -> None:
    variable = [
        (file, ast.unparse(argument))
        for file, argument in _literals(LOGGED_AT_0, 0)
        if not isinstance(argument, ast.Constant)
    ]

    # The warnings of the configuration.
    assert variable == [("command.py", "message")]


# What is refused, in the order of the table's last rows; {port}: one that is in use.
REFUSED = (
    "--http-endpoint=127.0.0.1:{port}",
    "--http-endpoint=203.0.113.1:9808",
    "--http-endpoint=nowhere.invalid:9808",
    "--http-endpoint=:9808 --metrics-address=:9809",
    "--csi-address=csi.sock",
    "--csi-address=$(ADDRESS)",
    "--csi-address=/csi/csi.sock\n",
    "--http-endpoint=http://127.0.0.1:9808",
    "--no-such-flag",
    "--csi-address /csi/csi.sock",
    "--probe-timeout=5",
    "--once true",
)
# What is refused only to another user, and what the file says before there is a program: other tests hold those.
REFUSED_ELSEWHERE = "permission denied", "CPython", "cannot unpack", "damaged"


def test_what_keeps_it_from_starting_is_as_told() -> None:
    told = [
        texts
        for texts in column(TROUBLESHOOTING, "it says", "do")
        if not any(word in texts for word in REFUSED_ELSEWHERE)
    ]
    assert len(told) == len(REFUSED)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        for texts, refused in zip(told, REFUSED, strict=True):
            line = refused.format(port=taken.getsockname()[1])
            # One item if the space in it is the mistake.
            arguments = [line] if "one item" in texts else line.split(" ")
            done = subprocess.run(
                [*program.built(), *arguments], capture_output=True, check=False, text=True, timeout=30
            )
            [last] = done.stderr.splitlines()[-1:]

            shown = re.split("`, `", texts.strip("`"))[0]
            pieces = [piece for piece in re.split("…", shown) if piece.strip()]
            assert done.returncode in (Exit.CONFIGURATION, Exit.FLAGS)
            assert re.search(".*".join(map(re.escape, (piece.strip(' "') for piece in pieces))), last), last


# ---- the first page


def test_flags_on_the_first_page_are_those_that_do_something() -> None:
    [block] = [block for block in code_blocks(README, "text") if block.startswith("--csi-address")]

    told = re.findall(r"(?m)^--([a-z-]+)=(\S*) +\S", block)

    effective = [flag for flag in config.FLAGS if "without effect" not in flag.usage]
    assert sorted(told) == sorted((flag.name, flag.default) for flag in effective)


def test_reasons_on_the_first_page_are_real() -> None:
    section = README.partition("\n## Your driver is failing?\n")[2].partition("\n## ")[0]
    texts = {row[-1] for row in table(REFERENCE, "the driver", "verdict", "exit", "text")}

    told = re.findall(r"(?m)^- `([^`]+)`", section)

    assert len(told) == 6
    for text in told:
        assert any(re.match("`?" + ".*".join(map(re.escape, text.split("…"))), each) for each in texts), text


def test_the_first_page_leads_to_all_others() -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in PAGES if path.parent in (ROOT, ROOT / "docs")}

    assert pages - set(re.findall(r"\]\(([^)#]+)", README)) == {"README.md"}


def test_what_is_to_be_pasted_by_hand_works_and_leaves_nothing(folder: Path) -> None:
    [block] = [block for block in code_blocks(README, "sh") if "examples/driver.py" in block]
    # With whichever Python and file are tested here.
    block = block.replace(".venv/bin/python", sys.executable)
    block = block.replace("bin/livenessprobe", shlex.join(program.built()))

    done = subprocess.run(
        ["bash", "-c", f"{block}\njobs"],
        capture_output=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        text=True,
    )

    expected = re.findall(r"(?m)--once .* # (.*)$", block)
    assert len(expected) == 2
    lines = done.stdout.splitlines()
    assert [line for line in lines if "listens on" not in line] == expected
    assert not list(folder.iterdir())


VARYING = {
    r"/tmp/lp\w+": "FOLDER",
    r"[IWEF]\d{4} [\d:.]+ +\d+ (\w+\.py):\d+\]": r"\1",
    r"127\.0\.0\.1:\d+": "ADDRESS",
    r'\d+\.\d+( s|s")': "SECONDS",
}


def test_the_picture_is_what_the_demo_prints(folder: Path) -> None:
    command = folder / "livenessprobe"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(program.built())} "$@"\n')
    command.chmod(0o755)
    demo = subprocess.run(
        [sys.executable, "examples/demo.py", command],
        capture_output=True,
        check=True,
        cwd=ROOT,
        text=True,
    )
    picture = (ROOT / "docs" / "demo.svg").read_text()
    shown = html.unescape("".join(re.findall("<text [^>]*>([^<]*)</text>", picture))).replace("\xa0", " ")

    # Lines are broken to fit the picture; the title comes first.
    def constant(text: str) -> str:
        for pattern, same in VARYING.items():
            text = re.sub(pattern, same, text)
        return "".join(text.split())

    assert constant(shown) == constant(f"make demo\n{demo.stdout}"), "run: make picture"


# ---- CONTRIBUTING


def test_targets_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony

    listed = [row.removeprefix("make ") for row in column(CONTRIBUTING, "target", "what it does")]

    assert listed == phony[1].split()
    assert listed == re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)


def test_targets_in_the_text_exist() -> None:
    code = re.findall(r"(?s)```sh\n(.*?)```|`([^`\n]+)`", README + CONTRIBUTING)
    named = set(re.findall(r"(?m)^make ([a-z-]+)", "\n".join(map("\n".join, code))))

    assert len(named) > 2
    assert named <= {row.removeprefix("make ") for row in column(CONTRIBUTING, "target", "what it does")}


def test_the_map_has_each_test_file() -> None:
    listed = "".join(files for _, files in table(CONTRIBUTING, "what the program does", "test files"))

    assert set(re.findall(r"\btest_\w+", listed)) == {
        path.stem for path in (ROOT / "tests").glob("test_*.py")
    }


def test_layout_names_each_module() -> None:
    listed = column(CONTRIBUTING, "file", "what is in it, and its rule")

    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.glob("*.py")}
    assert {path for path in listed if path.startswith("livenessprobe/")} == modules
    assert not [path for path in listed if not (ROOT / path).exists()]


def test_imports_are_as_told() -> None:
    # Modules' names in ticks; table() has removed the ticks of a single one.
    told = {
        module: set(re.findall("`([a-z_0-9]+)`", cell)) or {cell}
        for module, cell in table(CONTRIBUTING, "module", "may import")
    }
    seen: dict[str, set[str]] = {}
    for path in PACKAGE.glob("*.py"):
        modules = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "livenessprobe":
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("livenessprobe."):
                modules.add(str(node.module).split(".")[1])
        seen[path.stem] = modules - {"__version__"} - told["everyone"]

    assert {module: modules for module, modules in told.items() if module != "everyone"} == {
        module: modules for module, modules in seen.items() if modules
    }


# ---- all pages


def _anchors(page: str) -> set[str]:
    """What links call a page's headings, as hosting sites do."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match("https://", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in _anchors(file.read_text())):
            broken.append(target)

    assert not broken


def test_tests_that_hold_a_claim_exist() -> None:
    defined = {
        f"{path.name}::{node.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    named = {name for page in PAGES for name in re.findall(r"test_\w+\.py::\w+", page.read_text())}

    assert len(named) > 40
    assert not named - defined


def test_each_claim_of_security_names_a_test() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    claims = [
        line for line in page.splitlines() if line.startswith("| ") and not line.endswith("| held by |")
    ]

    assert len(claims) > 30
    assert not [claim for claim in claims if "::test_" not in claim.split("|")[-2]]


SHELL = [
    (page, line) for page in PAGES for line in "\n".join(code_blocks(page.read_text(), "sh")).splitlines()
]


def test_shell_examples_can_be_parsed() -> None:
    assert {"README.md", "CONTRIBUTING.md", "runbook.md", "release.md"} <= {page.name for page, _ in SHELL}
    assert [words for _, line in SHELL if (words := shlex.split(line, comments=True))[:1] == ["make"]]


def test_changelog_has_this_version() -> None:
    page = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.*?)\]", page, re.MULTILINE)

    assert headings
    assert headings[0] in ("Unreleased", __version__)
    assert __version__ in page
