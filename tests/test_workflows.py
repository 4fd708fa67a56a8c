"""GitHub's workflows and forms: valid, safe and true to the Makefile; and what a release does before it publishes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import program
import pytest
import release
import yaml

from livenessprobe import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.unmeasured

ROOT = program.ROOT
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").iterdir())
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").iterdir())


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run what is installed beside this Python."""
    command = [Path(sys.executable).with_name(name), *arguments]
    return subprocess.run(command, capture_output=True, check=False, text=True)


def load(path: Path) -> dict[str, Any]:
    # Not as YAML 1.1 does, where the key `on` is a boolean.
    return dict(yaml.load(path.read_text(), yaml.BaseLoader))


SCHEMAS = {
    "github-workflows": WORKFLOWS,
    "github-issue-forms": [path for path in FORMS if path.name != "config.yml"],
    "github-issue-config": [path for path in FORMS if path.name == "config.yml"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_is_what_github_wants(schema: str, folder: Path) -> None:
    """Each file, and beside it one that is wrong: a start of the tool costs much more than a file."""
    right, wrong = SCHEMAS[schema], []
    for path in right:
        wrong.append(folder / path.name)
        wrong[-1].write_text(path.read_text() + "unheard-of: [1]\n")
    done = tool(
        "check-jsonschema", f"--builtin-schema=vendor.{schema}", "--output-format=json", *right, *wrong
    )

    told = json.loads(done.stdout)
    assert (done.returncode, told["parse_errors"]) == (1, []), done.stdout + done.stderr
    assert {error["filename"] for error in told["errors"]} == set(map(str, wrong)), done.stdout
    assert right


def test_workflows_are_safe(folder: Path) -> None:
    """No secrets for strangers, no more rights than needed, no action that another commit could replace."""
    safe = tool("zizmor", "--offline", "--no-progress", *WORKFLOWS)
    text = WORKFLOWS[0].read_text()
    (folder / "ci.yml").write_text(re.sub("@[0-9a-f]{40}", "@main", text))
    unsafe = tool("zizmor", "--offline", "--no-progress", folder / "ci.yml")

    assert safe.returncode == 0, safe.stdout
    assert "unpinned-uses" in unsafe.stdout
    assert unsafe.returncode != 0


def steps() -> list[dict[str, Any]]:
    return [
        step for path in WORKFLOWS for job in load(path)["jobs"].values() for step in job.get("steps", [])
    ]


def test_actions_are_pinned_by_commit_and_leave_no_token_behind() -> None:
    used = re.findall(r"uses: (actions/\S+)@(\S+)(.*)", "".join(path.read_text() for path in WORKFLOWS))

    assert len(used) == len([step for step in steps() if "uses" in step])
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for _, commit, _ in used)
    assert all(re.fullmatch(r" # v\d+\.\d+\.\d+", tag) for *_, tag in used), "for those who read it"
    checkouts = [step for step in steps() if "actions/checkout" in step.get("uses", "")]
    assert checkouts
    assert {dict(step["with"])["persist-credentials"] for step in checkouts} == {"false"}
    assert len({(action, commit, tag) for action, commit, tag in used}) == len(
        {action for action, *_ in used}
    )


def test_what_runs_are_commands_of_the_project() -> None:
    makefile = (ROOT / "Makefile").read_text()
    scripts = "\n".join(step["run"] for step in steps() if "run" in step)

    assert (GITHUB / "workflows" / "ci.yml").read_text().count("- run: ") == 2
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert re.findall(r"(?m)^make ([a-z-]+)", scripts) == ["audit", "release", "mutants"]
    for target in ("audit", "release", "mutants"):
        assert f"\n{target}: " in makefile
    assert set(re.findall("([A-Z]+)=", "".join(re.findall("(?m)^make .*$", scripts)))) == {"REGISTRY"}
    assert re.search(r"(?m)^REGISTRY \?= ", makefile)


def test_who_may_publish_runs_nothing_of_the_project() -> None:
    workflow = load(GITHUB / "workflows" / "release.yml")
    publish = workflow["jobs"]["publish"]

    assert workflow["permissions"] == {}
    rights = dict.fromkeys(("attestations", "contents", "id-token", "packages"), "write")
    assert publish["permissions"] == rights
    for name in ("audit.yml", "ci.yml"):
        assert load(GITHUB / "workflows" / name)["permissions"] == {"contents": "read"}
    assert workflow["jobs"]["ci"] == {
        "permissions": {"contents": "read"},
        "uses": "./.github/workflows/ci.yml",
    }
    for step in publish["steps"]:
        assert not re.search(r"\b(make|python3?|pip)\b|\./|\.ci", step.get("run", "")), step


def test_every_file_and_image_is_attested_before_the_release_is_made() -> None:
    publish = load(GITHUB / "workflows" / "release.yml")["jobs"]["publish"]
    names = [step.get("name", "") for step in publish["steps"]]
    attested = [step["with"] for step in publish["steps"] if "/attest-" in step.get("uses", "")]

    assert attested == [
        {"subject-path": "dist/*"},
        {
            "subject-name": "${{ steps.image.outputs.name }}",
            "subject-digest": "${{ steps.image.outputs.digest }}",
            "push-to-registry": "true",
            "create-storage-record": "false",
        },
    ]
    order = ["Attest the files", "Push the image", "Attest the image", "Make the release"]
    assert names[-len(order) :] == order


# ---- the steps of a release, with programs that only record what they were asked for

TOLD = """#!/bin/sh
echo "${0##*/} $*" >>"$TOLD"
[ "${0##*/} $1" != "docker login" ] || cat >>"$TOLD"
[ "${0##*/} $1" != "skopeo copy" ] || printf sha256:abc >digest
"""


@pytest.fixture
def publish(folder: Path) -> Callable[..., tuple[int, str, list[str]]]:
    """`publish(tag)` runs the steps until one fails: the exit code, what they print, the programs called."""
    place = folder / "checkout"
    (place / "livenessprobe").mkdir(parents=True)
    shutil.copy(ROOT / "livenessprobe" / "__init__.py", place / "livenessprobe")
    (place / "CHANGELOG.md").write_text(
        f"# Changelog\n\n## [Unreleased]\n\n- later\n\n## [{__version__}] - 2026-11-23\n\n- now\n\n## [0.0.9]\n\n- old\n"
    )
    (place / "dist").mkdir()
    for name in (release.layout_name(), release.file_name("linux/amd64")):
        (place / "dist" / name).write_text(name)
    release.write_checksums(place / "dist")
    (folder / "bin").mkdir()
    for name in ("docker", "gh", "skopeo"):
        (folder / "bin" / name).write_text(TOLD)
        (folder / "bin" / name).chmod(0o755)

    def run(tag: str) -> tuple[int, str, list[str]]:
        told = folder / "told"
        told.touch()
        env = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "TOLD": str(told),
            "GITHUB_ACTOR": "somebody",
            "GITHUB_OUTPUT": str(folder / "output"),
            "GITHUB_REF_NAME": tag,
            "GITHUB_REPOSITORY_OWNER": "Example",
            "TOKEN": "secret",
        }
        output = ""
        for step in load(GITHUB / "workflows" / "release.yml")["jobs"]["publish"]["steps"]:
            if "run" in step:
                command = ["bash", "-e", "-c", step["run"]]
                done = subprocess.run(
                    command, capture_output=True, check=False, cwd=place, env=env, text=True
                )
                output += done.stdout + done.stderr
                if done.returncode:
                    break
        return done.returncode, output, told.read_text().splitlines()

    return run


def test_release_is_published(publish: Callable[..., tuple[int, str, list[str]]], folder: Path) -> None:
    code, output, told = publish(f"v{__version__}")

    assert code == 0, output
    files = sorted(path.name for path in (folder / "checkout" / "dist").iterdir())
    image = f"ghcr.io/example/livenessprobe:v{__version__}"
    assert told == [
        "docker login --username somebody --password-stdin ghcr.io",
        "secret",
        f"skopeo copy --all --preserve-digests --digestfile digest oci-archive:dist/{release.layout_name()} docker://{image}",
        f"gh release create v{__version__} --verify-tag --title v{__version__} --notes-file notes.md "
        + " ".join(f"dist/{name}" for name in files),
    ]
    assert (folder / "checkout" / "notes.md").read_text().split() == ["-", "now"]
    assert (folder / "output").read_text() == f"name={image.partition(':')[0]}\ndigest=sha256:abc\n"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("tag", f"the tag is v9.9.9, but livenessprobe/__init__.py says {__version__}"),
        ("file", "FAILED"),
        ("changelog", f"CHANGELOG.md says nothing of {__version__}"),
    ],
)
def test_nothing_is_published_where_something_is_wrong(
    wrong: str, says: str, publish: Callable[..., tuple[int, str, list[str]]], folder: Path
) -> None:
    place = folder / "checkout"
    if wrong == "file":
        (place / "dist" / release.layout_name()).write_text("another")
    elif wrong == "changelog":
        (place / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{__version__}]\n\n## [0.0.9]\n\n- old\n")

    code, output, told = publish("v9.9.9" if wrong == "tag" else f"v{__version__}")

    assert code == 1
    assert says in output
    assert told == []
