"""The generated code is what `make proto` makes now, fits the packed runtime, and matches what CSI drivers speak."""

import re
from pathlib import Path

import google.protobuf
import pytest
from google.protobuf.message import Message
from packaging.version import Version

import proto
from livenessprobe import identity_pb2 as csi

PACKAGE = Path(csi.__file__).parent


@pytest.mark.parametrize("name", ["identity_pb2.py", "identity_pb2.pyi"])
def test_generated_code_is_current(tmp_path: Path, name: str) -> None:
    proto.generate(tmp_path)

    assert (tmp_path / "livenessprobe" / name).read_bytes() == (PACKAGE / name).read_bytes()


def test_generated_code_is_not_newer_than_the_runtime() -> None:
    made_with = re.search(r"Protobuf Python Version: (\S+)", (PACKAGE / "identity_pb2.py").read_text())

    assert made_with
    assert Version(made_with[1]) <= Version(google.protobuf.__version__)


def test_service_has_the_names_of_the_interface() -> None:
    service = csi.DESCRIPTOR.services_by_name["Identity"]

    assert service.full_name == "csi.v1.Identity"
    assert [(m.name, m.input_type.name, m.output_type.name) for m in service.methods] == [
        ("GetPluginInfo", "GetPluginInfoRequest", "GetPluginInfoResponse"),
        ("GetPluginCapabilities", "GetPluginCapabilitiesRequest", "GetPluginCapabilitiesResponse"),
        ("Probe", "ProbeRequest", "ProbeResponse"),
    ]


# The bytes that follow from the CSI specification's field numbers and types, written out by hand.
@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (csi.ProbeRequest(), ""),
        (csi.ProbeResponse(), ""),
        (csi.ProbeResponse(ready={"value": True}), "0a 02 08 01"),
        (csi.ProbeResponse(ready={}), "0a 00"),
        (csi.GetPluginInfoRequest(), ""),
        (csi.GetPluginInfoResponse(name="a.b", vendor_version="1"), "0a 03 61 2e 62 12 01 31"),
        (csi.GetPluginInfoResponse(manifest={"k": "v"}), "1a 06 0a 01 6b 12 01 76"),
        (csi.GetPluginCapabilitiesResponse(capabilities=[{"service": {"type": 1}}]), "0a 04 0a 02 08 01"),
        (
            csi.GetPluginCapabilitiesResponse(capabilities=[{"volume_expansion": {"type": 2}}]),
            "0a 04 12 02 08 02",
        ),
    ],
)
def test_messages_have_the_bytes_of_the_interface(message: Message, wire: str) -> None:
    assert message.SerializeToString() == bytes.fromhex(wire)
    assert type(message).FromString(bytes.fromhex(wire)) == message
