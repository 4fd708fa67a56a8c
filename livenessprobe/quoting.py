"""Making foreign text safe to print: one line, no control characters, at most 4 KiB. Imports nothing."""

LONGEST_TEXT = 4096  # bytes of UTF-8

# The escapes of Go's strconv.Quote; everything else that cannot be printed is written as \x, \u or \U.
_SHORT = {"\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v"}


def printable(text: str) -> str:
    """Replace what cannot be printed (control characters, line and direction marks, broken UTF-8) by Go's escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def quote(text: str) -> str:
    """Put a text into double quotes as Go's strconv.Quote does."""
    return '"' + printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def cut(text: str) -> str:
    """Shorten a text of more than 4 KiB (as UTF-8) to 4 KiB, and say so at its end; cutting twice changes nothing."""
    data = text.encode(errors="surrogatepass")
    if len(data) <= LONGEST_TEXT:
        return text
    note = f"... (cut, {len(data)} bytes in all)"
    end = LONGEST_TEXT - len(note)
    while data[end] & 0xC0 == 0x80:  # within a character
        end -= 1
    return data[:end].decode(errors="surrogatepass") + note


def _escape(character: str) -> str:
    code = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries a byte of broken UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
