"""docs/operations.md, troubleshooting.md and migration.md tell the truth: their tables match the program, their sums are right."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import manifest
import program
import pytest
from finding import Kind
from sidecar import check
from test_docs import REFERENCE, TROUBLESHOOTING, code_blocks, column, table
from test_manifest import check_manifest

from livenessprobe import config, health
from livenessprobe.history import History

if TYPE_CHECKING:
    from conftest import ProbeFactory
    from fake_driver import FakeDriver

ROOT = program.ROOT
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
MIGRATION = (ROOT / "docs" / "migration.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
NODES = 10_000
DAY = 86400
GRACE = 30  # terminationGracePeriodSeconds, where it is not written

# ---- the texts; other tests compare docs/reference.md with the program


def test_each_text_has_its_cause_and_cure() -> None:
    told = table(TROUBLESHOOTING, "text", "meaning", "cause", "what to do")

    # In the reference, a row may go on after the text.
    expected = [
        row[3].split(" (or ")[0].strip("`")
        for row in table(REFERENCE, "the driver", "verdict", "exit", "text")
    ]
    assert [row[0] for row in told] == expected
    assert all(row[3] for row in told)


def test_rare_texts_are_those_of_the_sources() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "livenessprobe").glob("*.py"))
    codes = ("Internal", "Canceled", "DeadlineExceeded")
    known = "cannot connect to ", *(f"rpc error: code = {code} desc = " for code in codes)

    for text in column(TROUBLESHOOTING, "rare text", "meaning", "what to do"):
        rest = next(text.removeprefix(prefix) for prefix in known if text.startswith(prefix))
        pieces = filter(
            None, re.split(r"…(?:: )?|too many open files|can't start new thread|gRPC hangs|[()]", rest)
        )
        assert all(piece.strip(" :") in sources for piece in pieces), text


# ---- what can be tried or reckoned


def test_restarts_come_when_told() -> None:
    names = ("--probe-timeout", "timeoutSeconds", "periodSeconds", "failureThreshold")
    ends = "SIGTERM, fails at once", "SIGTERM, hangs", "SIGKILL, hangs"
    for row in table(OPERATIONS, "driver", *(f"`{name}`" for name in names), *ends):
        ours, theirs, period, threshold, term, late_term, kill = (
            int(cell.removesuffix("s").rstrip()) for cell in row[1:]
        )

        assert ours <= theirs
        assert term == (threshold - 1) * period
        # The kubelet does not begin a probe while another runs.
        assert late_term == (threshold - 1) * max(period, theirs) + theirs
        assert kill == late_term + GRACE


def test_ports_are_those_of_the_field() -> None:
    taken = set(re.findall("[0-9]+", " ".join(column(OPERATIONS, "port", "who"))))

    used = set()
    for pod in manifest.pods((Path(__file__).parent / "helpers" / "field_manifests.yaml").read_text()):
        used |= {str(probe.port) for probe in pod.probes}
    # Not on the host's network, so any other would do; and the registrar's own.
    assert used - taken == {"9809", "9909"}


@pytest.mark.parametrize(
    "row", range(5), ids=["root", "another", "another, 0757", "in the group", "in the group, 0755"]
)
def test_users_and_sockets_are_as_told(row: int, driver: FakeDriver) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    rows = table(OPERATIONS, "the sidecar runs as", "the socket is root's, its mode", "answer")
    assert len(rows) == 5
    who, mode, answer = rows[row]
    socket = Path(driver.target)
    socket.chmod(int(mode, 8))
    user, group = (0, 0) if who.startswith("root") else (65534, 0 if "group" in who else 65534)

    changes = [f"--reuid={user}", f"--regid={group}", "--clear-groups", "--bounding-set=-all"]
    # Another user may not enter this checkout.
    once = [*program.built(65534), "--once", f"--csi-address={socket}"]
    done = subprocess.run(
        ["env", "--unset=LIVENESSPROBE_PYTHON", "setpriv", *changes, "--", *once],
        capture_output=True,
        check=False,
        cwd="/",
        text=True,
    )

    assert answer in done.stdout
    assert (done.returncode == 0) == (answer == "ok")


def test_a_scrape_is_as_large_as_told(driver: FakeDriver, probe: program.Probe) -> None:
    measured = dict(row[:2] for row in table(OPERATIONS, "measured", "figure", "shown by"))
    probe.wait_for_log("Learnt the CSI driver's name", timeout=60)
    probe.get()
    scrape = probe.get("/metrics").text
    packed = probe.get("/metrics", headers={"Accept-Encoding": "gzip"}).body

    samples = [line for line in scrape.splitlines() if not line.startswith("#")]
    assert measured["samples of a scrape"] == str(len(samples))
    buckets = sum("_bucket{" in line for line in samples)
    assert f"Of the {len(samples)} samples, {buckets} are buckets" in OPERATIONS
    # Its numbers have more or fewer digits.
    for what, answer in (("bytes of a scrape", packed), ("… that is not packed", scrape)):
        assert float(measured[what].removesuffix(" kB")) == pytest.approx(len(answer) / 1e3, rel=0.1)


def _lines_of_a_day(period: int) -> int:
    """What is logged about a driver that fails all day."""
    history, verdict = History(), health.failed("Internal", "broken")
    return sum(history.add(verdict, now, now) is not None for now in range(0, DAY, period))


def test_sums_for_many_nodes() -> None:
    measured = [float(row[1].split()[0]) for row in table(OPERATIONS, "measured", "figure", "shown by")]
    check_ms, resident, samples, scrape_kb, _, image, layer, lines = measured
    assert lines == _lines_of_a_day(10)
    # In that table the program's figure is the first after the unit and the budget.
    paced = re.search(
        r"^CPU a check, one every 2 s, idle included .*? (\d+\.\d+) ", PERFORMANCE, re.MULTILINE
    )
    assert paced
    assert check_ms == float(paced[1])

    a_second, a_day = NODES * samples / 30, NODES * samples / 30 * DAY
    expected = [
        ("CPU, a check every 2 s", f"{NODES * check_ms / 2e3:.1f} CPUs", f"{check_ms / 2:.2f} thousandths of a CPU for each"),
        ("CPU, a check every 10 s", f"{NODES * check_ms / 1e4:.1f} CPUs", f"{check_ms / 10:.2f} thousandths of a CPU for each"),
        ("CPU requested, at 10m", f"{NODES / 100:.0f} CPUs", "what the scheduler takes away"),
        ("memory used", f"{NODES * resident / 1024:.0f} GiB", ""),
        ("memory requested, at 32Mi", f"{NODES * 32 / 1024:.1f} GiB", ""),
        ("series in Prometheus", f"{NODES * samples:,.0f}", ""),
        ("scrapes a second, every 30 s", f"{NODES / 30:.0f}", f"{NODES / 30 * scrape_kb / 1e3:.1f} MB/s"),
        ("samples a second", f"{a_second:,.0f}", ""),
        ("samples a day", f"{a_day / 1e6:,.0f} million", f"{a_day * 1.5 / 1e9:.1f} GB at 1.5 bytes each, which is what Prometheus counts with"),
        ("first pull of the image", f"{NODES * image / 1e3:.0f} GB", f"{image / 10:.1f} GB where 100 nodes pull at a time"),
        ("pull of a new version, Debian's layer unchanged", f"{NODES * layer / 1e3:.1f} GB", ""),
        ("lines of log a day, all drivers failing", f"{NODES * lines:,.0f}", f"{NODES * DAY / 1e7:.0f} million with a line for each check"),
        ("lines of log a day, all healthy", "0", ""),
    ]  # fmt: skip
    assert [tuple(row) for row in table(OPERATIONS, "of 10,000 sidecars", "figure", "is")] == expected


def test_units_in_the_text_exist() -> None:
    named = set(re.findall(r"livenessprobe(?:-once)?@\S*?mydriver(?:\.timer)?", OPERATIONS))

    assert len(named) == 3
    for unit in named:
        file = unit.replace("mydriver", "") + ("" if unit.endswith(".timer") else ".service")
        assert (ROOT / "deploy" / "systemd" / file).exists(), unit


# ---- migration


def _in_ticks(cells: list[str]) -> list[str]:
    """The pieces of code in a table's cells, which have no ticks if they are nothing but code."""
    return re.findall("`([^`]+)`", " ".join(cell if "`" in cell else f"`{cell}`" for cell in cells))


def test_migration_tells_of_each_flag() -> None:
    told = _in_ticks(column(MIGRATION, "flag", "upstream", "here", "verdict"))

    assert sorted(told) == sorted(flag.name for flag in config.FLAGS)


def test_migration_names_our_messages() -> None:
    ours = set(column(REFERENCE, "message", "severity", "meaning", "cause", "what to do"))

    named = set(_in_ticks([row[1] for row in table(MIGRATION, "upstream (v2.12 on)", "here")]))

    assert named > {"Serving", "CSI driver is not healthy"}
    assert named - {"-v=5", "--once"} <= ours


def test_all_pages_tell_the_memory_that_was_measured() -> None:
    measured = dict(row[:2] for row in table(PERFORMANCE, "what", "figure", "shown by"))
    without = measured["resident memory after 2,000 checks, without metrics"]
    with_metrics = measured["the same, with metrics"]
    reckoned = dict(row[:2] for row in table(OPERATIONS, "measured", "figure", "shown by"))
    told = {row[0]: row[2] for row in table(MIGRATION, "figure", "upstream", "here", "verdict")}

    assert reckoned["resident memory, with metrics"] == with_metrics
    assert told["memory, resident"] == f"{without}, {with_metrics} with metrics"


@pytest.mark.parametrize("subject", ["flag", "event", "request", "metric", "figure"])
def test_migration_judges_each_row(subject: str) -> None:
    rows = table(MIGRATION, subject, "upstream", "here", "verdict")

    assert rows
    assert {re.split("[: ]", row[3])[0] for row in rows} <= {"same", "better", "different"}


SAMPLE = """
kind: DaemonSet
metadata: {name: csi-node}
spec:
  template:
    spec:
      hostNetwork: true
      containers:
      - name: driver
        ports: [{name: healthz, containerPort: 9808}]
        livenessProbe: {httpGet: {path: /healthz, port: healthz}, timeoutSeconds: 3}
        volumeMounts: [{name: socket-dir, mountPath: /csi}]
      - name: liveness-probe
        image: registry.k8s.io/sig-storage/livenessprobe:v2.10.0
        args: ["--csi-address=$(ADDRESS)", "--logtostderr", "--v=5"]
        env: [{name: ADDRESS, value: /csi/csi.sock}]
        resources: {limits: {memory: 20Mi}}
        securityContext:
          readOnlyRootFilesystem: true
          allowPrivilegeEscalation: false
          capabilities: {drop: [ALL]}
        volumeMounts: [{name: socket-dir, mountPath: /csi}]
      volumes: [{name: socket-dir, hostPath: {path: /var/lib/kubelet/plugins/csi.example.com}}]
"""


def test_logs_are_found_as_migration_says(
    probe_factory: ProbeFactory, socket_path: Path, folder: Path
) -> None:
    """Runs its commands on the logs of a probe that starts with a warning and finds no driver."""
    commands = [line.partition("  #")[0].rstrip() for line in code_blocks(MIGRATION, "sh")[-1].splitlines()]
    flags = f"--csi-address={socket_path}", "--probe-timeout=200ms", "--logtostderr"
    for file, format_flag in {"probe.log": "text", "probe.json": "json"}.items():
        probe = probe_factory(*flags, "--http-endpoint=127.0.0.1:0", f"--logging-format={format_flag}")
        assert probe.get().status == 500
        assert probe.stop() == 0
        (folder / file).write_text("".join(f"{line}\n" for line in [*probe.log_lines, "not a line of ours"]))

    found = [
        subprocess.check_output(["sh", "-c", command], cwd=folder, text=True).splitlines()
        for command in commands
    ]

    text, json = ((folder / file).read_text().splitlines()[:-1] for file in ("probe.log", "probe.json"))
    assert len(text) > 3
    assert found == [
        text,
        [line for line in text if line.startswith(("W", "E"))],
        json,
        [line for line in json if "CSI driver is not healthy" in line],
    ]
    assert [len(lines) for lines in found[1::2]] == [2, 1]


def test_the_report_in_migration_is_real() -> None:
    done = subprocess.run([check_manifest(), "-"], capture_output=True, check=False, input=SAMPLE, text=True)
    [shown] = code_blocks(MIGRATION, "text")

    assert done.stdout.startswith(shown + "\n")


def test_migration_explains_each_word_of_the_report() -> None:
    words = column(MIGRATION, "word", "what follows")

    assert sorted(words) == sorted([*(kind.value for kind in Kind), "image"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml")), ids=lambda path: path.name
)
def test_manifests_of_ours_pass_the_check(path: Path) -> None:
    sidecars = [(pod, each) for pod in manifest.pods(path.read_text()) for each in pod.containers]

    assert len(sidecars) == (path.stem != "exec-probe")
    for pod, sidecar in sidecars:
        assert not {each.kind for each in check(pod, sidecar)} & {Kind.BREAKS, Kind.REFUSED, Kind.WARNS}
