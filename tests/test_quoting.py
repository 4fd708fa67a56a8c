"""Foreign text made safe: Go's quoting, read back by a decoder of its own, and the limit of 4 KiB."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from livenessprobe.quoting import LONGEST_TEXT, cut, printable, quote

# Surrogates too, which is how Python carries broken UTF-8.
ANY_TEXT = st.text(st.characters()) | st.binary().map(lambda data: data.decode(errors="surrogateescape"))
LONG_TEXT = st.builds(lambda text, n: text * n, st.text(st.characters(), min_size=1), st.integers(1, 6000))

GO_TOKEN = re.compile(
    r'[^\\"]|\\(?:(?P<short>[abfnrtv\\"])|x(?P<byte>[0-9a-f]{2})'
    r"|u(?P<four>[0-9a-f]{4})|U(?P<eight>[0-9a-f]{8}))"
)
SHORT = dict(zip('abfnrtv\\"', '\a\b\f\n\r\t\v\\"', strict=True))


def unquoted(quoted: str) -> str:
    """What Go's strconv.Unquote would give, with a byte of broken UTF-8 as Python carries it."""
    assert quoted[0] == quoted[-1] == '"'
    text, at = "", 1
    while at < len(quoted) - 1:
        token = GO_TOKEN.match(quoted, at, len(quoted) - 1)
        assert token, f"no Go escape at {at}: {quoted}"
        at = token.end()
        if token["short"]:
            text += SHORT[token["short"]]
        elif token["byte"]:
            code = int(token["byte"], 16)
            text += chr(code if code < 0x80 else 0xDC00 + code)
        elif token["four"] or token["eight"]:
            code = int(token["four"] or token["eight"], 16)
            assert not 0xDC80 <= code <= 0xDCFF, "a byte is written as one"
            text += chr(code)
        else:
            text += token[0]
    return text


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("", r'""'),
        ("plain text", r'"plain text"'),
        ("\a\b\f\r\n\t\v", r'"\a\b\f\r\n\t\v"'),
        ("\\", r'"\\"'),
        ('say "hi"', r'"say \"hi\""'),
        ("'", r'''"'"'''),
        ("\x00\x04\x1b\x7f", r'"\x00\x04\x1b\x7f"'),
        (b"abc\xffdef".decode(errors="surrogateescape"), r'"abc\xffdef"'),
        ("\x80\x85\x9b", r'"\u0080\u0085\u009b"'),
        ("\udc7f\udd00", r'"\udc7f\udd00"'),
        ("☺ größer 🦄", '"☺ größer 🦄"'),
        ("!\u00a0!\u2000!\u3000!", r'"!\u00a0!\u2000!\u3000!"'),
        ("\u2028\u2029\u202e\ufeff\u00ad", r'"\u2028\u2029\u202e\ufeff\u00ad"'),
        ("\U0010ffff\U000e0001", r'"\U0010ffff\U000e0001"'),
    ],
)
def test_quotes_as_go(text: str, quoted: str) -> None:
    assert quote(text) == quoted


@given(ANY_TEXT)
def test_a_quoted_text_is_one_printable_line_and_can_be_read_back(text: str) -> None:
    quoted = quote(text)

    assert quoted.isprintable()
    assert quoted.splitlines() == [quoted]
    assert unquoted(quoted) == text


@given(ANY_TEXT)
def test_printable_escapes_what_cannot_be_printed_and_nothing_else(text: str) -> None:
    result = printable(text)

    assert result.isprintable()
    assert printable(result) == result
    assert (result == text) == text.isprintable()
    assert unquoted('"' + printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"') == text


@given(ANY_TEXT | LONG_TEXT)
@example("\udcff" * 2000)
@example("x" + "🦄" * 2000)
def test_cut_keeps_the_beginning_and_says_how_much_there_was(text: str) -> None:
    size = len(text.encode(errors="surrogatepass"))

    result = cut(text)

    assert len(result.encode(errors="surrogatepass")) <= LONGEST_TEXT
    assert cut(result) == result
    if size <= LONGEST_TEXT:
        assert result == text
    else:
        note = f"... (cut, {size} bytes in all)"
        assert result.endswith(note)
        assert text.startswith(result.removesuffix(note))
        # No more than needed: one more character would not have fitted.
        assert len(result.encode(errors="surrogatepass")) > LONGEST_TEXT - 4


@pytest.mark.parametrize("character", ["a", "ß", "€", "🦄", "\0", "\udcff"])
@pytest.mark.parametrize("more", [0, 1])
def test_cut_at_the_limit(character: str, more: int) -> None:
    size = len(character.encode(errors="surrogatepass"))
    text = "x" * (LONGEST_TEXT % size + more) + character * (LONGEST_TEXT // size)

    assert (cut(text) == text) == (more == 0)


def test_every_byte_of_broken_utf_8() -> None:
    for byte in range(0x80, 0x100):
        assert quote(bytes([byte]).decode(errors="surrogateescape")) == rf'"\x{byte:02x}"'


def test_the_limit_is_4_kib() -> None:
    assert LONGEST_TEXT == 4096
