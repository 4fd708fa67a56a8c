"""http2_frames.py: the bounds of what is taken, from both sides, and how a long block of header fields is cut."""

from __future__ import annotations

import peers
import pytest
import verdicts
from hpack import Decoder, Encoder
from hpack.struct import HeaderTuple

from livenessprobe import http2_frames
from livenessprobe.http2_frames import Broken, Frame, Frames, HeaderFields, TooMuch

MIB = 1 << 20
TOO_MUCH = "the peer sends too much that is not an answer"
TOO_MANY_FIELDS = "more than 1 MiB of header fields, which hold an error's text too"


def read(frames: Frames, data: bytes) -> list[Frame]:
    """All frames there are once this has also come."""
    frames.add(data)
    return list(iter(frames.next, None))


# ---- frames


def test_a_frame_is_read_as_soon_as_its_last_byte_is_there() -> None:
    frames = Frames()
    for said, expected in [
        (peers.SETTINGS, Frame(4, 0, 0, b"", 0)),
        (peers.frame(6, b"question", 1), Frame(6, 1, 0, b"question", 8)),
        (peers.frame(77, b"x" * 16384, 255, 2**32 - 1), Frame(77, 255, 2**31 - 1, b"x" * 16384, 16384)),
        (verdicts.padded(0, b"data", 3), Frame(0, 8, 1, b"data", 8)),
    ]:
        assert read(frames, said[:-1]) == []
        assert read(frames, said[-1:]) == [expected]


def test_the_first_nine_bytes_are_kept_however_they_come() -> None:
    frames = Frames()
    for piece in (b"HTTP/", b"1.1 400 Bad Request", b"\r\n"):
        frames.add(piece)

    assert frames.first == b"HTTP/1.1 "


def test_a_priority_may_be_all_of_a_frame() -> None:
    said = peers.frame(1, bytes(5), 0x20, 1) + peers.frame(9, b"block", 4, 1)

    assert read(Frames(), peers.SETTINGS + said)[1:] == [Frame(1, 0x20, 1, b"block", 5)]


def test_more_frames_than_an_answer_may_have_are_not_taken() -> None:
    frames = Frames()
    assert len(read(frames, peers.SETTINGS + peers.frame(77) * 69_999)) == 70_000
    with pytest.raises(TooMuch, match=f"^{TOO_MUCH}$"):
        read(frames, peers.frame(77))


def test_more_bytes_than_an_answer_may_have_are_not_taken() -> None:
    most = 8 * MIB
    large = peers.frame(77, bytes(16384))
    said = peers.SETTINGS + large * ((most - 100) // len(large))
    said += peers.frame(77, bytes(most - len(said) - 9))
    frames = Frames()
    assert len(said) == most
    assert len(read(frames, said)) == 2 + (most - 100) // len(large)
    with pytest.raises(TooMuch, match=f"^{TOO_MUCH}$"):
        read(frames, peers.frame(77))


def test_a_header_block_that_goes_on_and_on_is_not_collected() -> None:
    frames = Frames()
    left = MIB + 64 * 1024
    assert read(frames, peers.SETTINGS + peers.frame(1, b"x", 0, 1))[1:] == []
    for _ in range(left // 16384):
        size = min(left - 1, 16384)
        assert read(frames, peers.frame(9, bytes(size), 0, 1)) == []
        left -= size
    assert left == 1
    with pytest.raises(TooMuch, match=f"^{TOO_MANY_FIELDS}$"):
        read(frames, peers.frame(9, b"x", 0, 1))


# ---- header fields

# Of all of a connection's header fields, each counted with 32 bytes more, as is each block.
MOST_OF_FIELDS = MIB + 64 * 1024


def block(size: int) -> bytes:
    """A block that counts this much."""
    return verdicts.field(b"x", b"y" * (size - 32 - 32 - 1))


@pytest.mark.parametrize("before", [0, 100, 10_000])
def test_header_fields_have_a_limit_together(before: int) -> None:
    for more in (0, 1):
        fields = HeaderFields()
        if before:
            assert fields.read(block(before)) == [(b"x", b"y" * (before - 65))]
        if more:
            with pytest.raises(TooMuch, match=f"^{TOO_MANY_FIELDS}$"):
                fields.read(block(MOST_OF_FIELDS - before + 1))
        else:
            assert len(fields.read(block(MOST_OF_FIELDS - before))) == 1


def test_blocks_of_nothing_count_too() -> None:
    fields = HeaderFields()
    for _ in range(MOST_OF_FIELDS // 32):
        assert fields.read(b"") == []
    with pytest.raises(TooMuch, match=f"^{TOO_MANY_FIELDS}$"):
        fields.read(b"")


@pytest.mark.parametrize("sizes", [1, 2, 3])
@pytest.mark.parametrize("long", [False, True])
def test_two_new_sizes_of_the_table_are_enough(sizes: int, long: bool) -> None:
    value = b"y" * (5000 if long else 5)
    said = b"\x20" * sizes + verdicts.field(b"x", value)
    if sizes > 2:
        with pytest.raises(
            Broken, match=r"^more than two new sizes of the table of header fields$"
        ) as broken:
            HeaderFields().read(said)
        assert broken.value.stream == 0
    else:
        assert HeaderFields().read(said) == [(b"x", value)]


def indexed(first: bytes, value: bytes) -> bytes:
    """A field whose name is in a table: the bytes that say where, and the value."""
    return first + verdicts.field(b"", value)[2:]


def with_first(first: int, name: bytes, value: bytes) -> bytes:
    """A field with a name of its own, which begins with this byte (RFC 7541, 6.2)."""
    return bytes([first]) + verdicts.field(name, value)[1:]


# One of each form, and of each length that a number may have.
PIECES = [
    b"\x20",
    b"\x3f\xe1\x1f",
    b"\x82",
    indexed(b"\x41", b"localhost"),
    with_first(0x40, b"x-new", b"1" * 126),
    b"\xbe",
    indexed(b"\x4f", b"gzip"),
    indexed(b"\x50", b"br"),
    indexed(b"\x7f\x00", b"2" * 127),
    indexed(b"\x04", b"/"),
    indexed(b"\x0e", b"200"),
    indexed(b"\x0f\x00", b"3" * 300),
    with_first(0x00, b"x" * 127, b""),
    with_first(0x10, b"x-never", b"4"),
    indexed(b"\x14", b"/never"),
    indexed(b"\x1f\x20", b"5"),
    *(with_first(0x40, b"%c" % (97 + number % 26), b"%d" % (number % 9)) for number in range(70)),
    b"\xfe",
    b"\xff\x00",
    indexed(b"\x7f\x40", b"6"),
    Encoder().encode([HeaderTuple(b"x-huffman", b"www.example.com")], huffman=True),
    with_first(0x00, b"x", b"7" * 3300),
]


def test_a_long_block_is_cut_into_its_fields() -> None:
    said = b"".join(PIECES)

    assert len(said) > 4096
    assert list(http2_frames._pieces(said)) == PIECES
    assert HeaderFields().read(said) == list(Decoder().decode(said, raw=True))


@pytest.mark.parametrize("size", [4096, 4097])
def test_a_short_block_is_cut_no_further_than_its_new_sizes_of_the_table(size: int) -> None:
    pieces = [b"\x20", verdicts.field(b"x", b"y" * (size - 8)), b"\x84"]
    said = b"".join(pieces)

    assert len(said) == size
    assert list(http2_frames._pieces(said)) == (pieces if size > 4096 else [b"\x20", said[1:]])
