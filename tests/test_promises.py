"""Each promise of this sidecar's first README is in ours or on a page it links to, and is kept."""

from __future__ import annotations

import re

import program
import pytest
import yaml

ROOT = program.ROOT
README = (ROOT / "README.md").read_text()
LINKED = sorted(set(re.findall(r"\]\((docs/\w+\.md)", README)))
TEXT = " ".join("".join([README, *((ROOT / page).read_text() for page in LINKED)]).split())

# What was promised, and what the pages have to say about it: regular expressions. Line breaks count as spaces.
PROMISES = {
    "detects whether a CSI driver is alive": ["[Ll]iveness", "CSI"],
    "calls Probe, which a CSI driver must answer": ["`Probe`"],
    "names the specification": [
        r"Container Storage Interface\]\(https://github\.com/container-storage-interface/"
    ],
    "works with the kubelet's livenessProbe": ["[Kk]ubelet", "livenessProbe"],
    "a driver that fails gets restarted": ["restart"],
    "a failure is a return code that is not zero": ["non-zero return code", "`--once`", r"\| exit \|"],
    "flag connection-timeout": [r"\| `connection-timeout` \| `30s` \|"],
    "flag csi-address": [r"\| `csi-address` \| `/run/csi/socket` \|"],
    "flag health-port": [r"\| `health-port` \| `9808` \|"],
    "compiled as one file, in the folder bin": ["make livenessprobe[`\n ]", "bin/livenessprobe"],
    "compiled as a container": ["make livenessprobe-container"],
    "the image's name": ["quay.io/k8scsi/livenessprobe:canary"],
    "the image is in Docker's local store": [r"docker images \| grep livenessprobe"],
    "what that shows": [r"quay\.io/k8scsi/livenessprobe +canary +[0-9a-f]{12} .*?MB"],
    "Kubernetes' community": [r"\]\(https://(www\.)?kubernetes\.io/community/\)"],
    "how to reach the maintainers": ["[Mm]aintainers"],
    "the code of conduct of Kubernetes": ["Kubernetes Code of Conduct", r"\]\(CODE_OF_CONDUCT\.md\)"],
    "how to report a vulnerability": [r"\]\(SECURITY\.md\)"],
    "how to contribute": [r"\]\(CONTRIBUTING\.md\)"],
}

# The driver's container and the sidecar's, as in the first example; the values are up to us.
DRIVER = {
    "ports": [{"name": "healthz", "containerPort": 9808}],
    "livenessProbe": {"httpGet": {"port": "healthz"}},
    "volumeMounts": [
        {"name": "socket-dir", "mountPath": "/csi"},
        {
            "name": "mountpoint-dir",
            "mountPath": "/var/lib/kubelet/pods",
            "mountPropagation": "Bidirectional",
        },
    ],
    "securityContext": {"privileged": True},
    "env": [
        {"name": "CSI_ENDPOINT", "value": "unix:///csi/csi.sock"},
        {"name": "KUBE_NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    ],
    "args": ["--endpoint=$(CSI_ENDPOINT)", "--nodeid=$(KUBE_NODE_NAME)"],
}
TIMES = {"initialDelaySeconds", "timeoutSeconds", "periodSeconds", "failureThreshold"}
SIDECAR = {
    "args": ["--csi-address=/csi/csi.sock"],
    "volumeMounts": [{"name": "socket-dir", "mountPath": "/csi"}],
}


@pytest.mark.parametrize("promise", PROMISES)
def test_promise_is_on_a_page(promise: str) -> None:
    missing = [pattern for pattern in PROMISES[promise] if not re.search(pattern, TEXT)]

    assert not missing


def has(given: object, wanted: object) -> bool:
    """Whether everything wanted is there, in lists in any place."""
    if isinstance(given, dict) and isinstance(wanted, dict):
        return all(key in given and has(given[key], value) for key, value in wanted.items())
    if isinstance(given, list) and isinstance(wanted, list):
        return all(any(has(each, value) for each in given) for value in wanted)
    return given == wanted


def test_example_has_all_that_the_first_one_had() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    blocks = re.findall(r"(?ms)^ *```yaml\n(.*?)^ *```$", page)
    pods = [block for block in map(yaml.safe_load, blocks) if "containers" in block]
    assert len(pods) == 1
    containers = {container["name"]: container for container in pods[0]["containers"]}

    assert has(containers["hostpath-driver"], DRIVER)
    assert containers["hostpath-driver"]["livenessProbe"].keys() >= TIMES
    assert has(containers["liveness-probe"], SIDECAR)
    assert "livenessprobe:" in containers["liveness-probe"]["image"]


@pytest.mark.parametrize("form", ["bug.yml", "feature.yml", "config.yml"])
def test_there_is_a_form_for_each_matter(form: str) -> None:
    assert (ROOT / ".github" / "ISSUE_TEMPLATE" / form).is_file()


def test_code_of_conduct_says_how_to_report() -> None:
    page = (ROOT / "CODE_OF_CONDUCT.md").read_text()

    assert "## How to report" in page
    assert "https://kubernetes.io/community/code-of-conduct/" in page
