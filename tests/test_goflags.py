"""Go's flag syntax and durations: against integer nanoseconds, and against junk."""

from __future__ import annotations

import math
import re
import time
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livenessprobe import goflags
from livenessprobe.goflags import Flag, FlagError, HelpRequested, boolean, duration, parse, string, unsigned

if TYPE_CHECKING:
    from collections.abc import Mapping

NANOSECONDS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
LONGEST = 2**63 - 1

# ---- durations

NUMBERS = st.one_of(
    st.integers(0, 10**6).map(str),
    st.builds("{}.{}".format, st.integers(0, 10**6), st.text("0123456789", max_size=15)),
    st.builds(".{}".format, st.text("0123456789", min_size=1, max_size=15)),
)


@given(
    st.sampled_from(["", "+", "-"]),
    st.lists(st.tuples(NUMBERS, st.sampled_from(list(NANOSECONDS))), min_size=1, max_size=6),
)
def test_a_duration_is_the_sum_of_its_parts(sign: str, parts: list[tuple[str, str]]) -> None:
    exact = sum(Fraction("0" + number.rstrip(".")) * NANOSECONDS[unit] for number, unit in parts)

    seconds = duration(sign + "".join(number + unit for number, unit in parts))

    assert math.isclose(abs(seconds) * 1e9, exact, rel_tol=1e-12, abs_tol=1.0)
    assert math.copysign(1, seconds) == (-1 if sign == "-" else 1)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2562047h47m16.854775807s", (2**63 - 1) / 1e9),
        ("9223372036854775807ns", (2**63 - 1) / 1e9),
        ("9223372036854775807.9ns", (2**63 - 1) / 1e9),
        ("-9223372036854775808ns", -(2**63) / 1e9),
        ("0" * 5000 + "3s", 3),
        ("3." + "0" * 5000 + "s", 3),
        ("0", 0),
        ("+0", 0),
        ("-0", 0),
        ("300ms", 0.3),
        ("3s", 3),
        ("1m0.5s", 60.5),
        ("1h", 3600),
        ("1h2m3s", 3723),
        ("1.s", 1),
        (".5s", 0.5),
        ("-1.5h", -5400),
        ("+5s", 5),
        ("1s1s", 2),
        ("1ms1h", 3600.001),
        ("0.3333333333333333333h", 1200),
        ("9007199254.740993s", 9007199254.740993),
        ("2562047h", 2562047 * 3600),
        ("0." + "0" * 500 + "1s", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5", "write 5s for seconds, 5ms for milliseconds"),
        ("-5", "missing unit"),
        ("1.5", "missing unit"),
        (".5", "missing unit"),
        ("5.", "missing unit"),
        ("1m5", "not a duration"),
        ("", "not a duration"),
        ("s", "not a duration"),
        (".s", "not a duration"),
        (".", "not a duration"),
        ("-", "not a duration"),
        ("+-5s", "not a duration"),
        ("--5s", "not a duration"),
        ("1..5s", "not a duration"),
        ("1.5.5s", "not a duration"),
        ("5 s", "unknown unit"),
        (" 5s", "not a duration"),
        ("5s ", "unknown unit"),
        ("5s\n", "unknown unit"),
        ("5S", "unknown unit"),
        ("5d", 'unknown unit "d"'),
        ("1e3s", "unknown unit"),
        ("0x5s", "unknown unit"),
        ("1_000s", "unknown unit"),
        ("٣s", "not a duration"),
        ("3s-2s", "unknown unit"),
        ("inf", "not a duration"),
        ("nan", "not a duration"),
        ("2562048h", "too long"),
        ("2562047h47m16.854775808s", "too long"),
        ("9223372036854775808ns", "too long"),
        ("-9223372036854775809ns", "too long"),
        ("9" * 5000 + "ns", "too long"),
        ("9" * 5000 + "h", "too long"),
        ("0" * 5000 + "9223372036854775808ns", "too long"),
        ("1" + "0" * 19 + "ns", "too long"),
        ("9" * 5000, "missing unit"),
        ("3" + "x" * 5000, r"unknown unit \"x+\.\.\. \(cut, 5000 bytes in all\)\""),
        ("9223372037s", "too long"),
        ("9" * 400 + "ns", "too long"),
    ],
)
def test_no_durations(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        duration(text)
    assert [whole for whole in NO_DURATION if re.fullmatch(whole, str(caught.value))]


# Everything that may be wrong with a duration, word for word.
NO_DURATION = (
    r"duration too long: the longest is 2562047h",
    r"missing unit in duration: write .* for seconds, .* for milliseconds",
    r"not a duration: write a number with a unit, as in 300ms, 3s, 1m30s",
    r'unknown unit ".*" in duration: the units are ns, us, ms, s, m, h',
)


@given(st.text() | st.text("0123456789.+-nuµmshe _"))
def test_junk_is_a_duration_or_a_value_error(text: str) -> None:
    seconds, problem = 0.0, ""
    try:
        seconds = duration(text)
    except ValueError as error:
        problem = str(error)

    assert problem.isprintable()
    assert abs(seconds) * 1e9 <= LONGEST * (1 + 1e-9)


@pytest.mark.parametrize(
    "text",
    ["1" * 100_000 + "..", "1" * 100_000 + "x", "1." * 50_000, "s" * 100_000, "1h" * 50_000 + "."],
    ids=["digits", "unit", "points", "letters", "parts"],
)
def test_junk_takes_no_long_time(text: str) -> None:
    begin = time.process_time()
    with pytest.raises(ValueError, match="duration"):
        duration(text)

    assert time.process_time() - begin < 1


# ---- booleans and integers


@pytest.mark.parametrize("text", ["1", "t", "T", "true", "TRUE", "True"])
def test_true(text: str) -> None:
    assert boolean(text) is True


@pytest.mark.parametrize("text", ["0", "f", "F", "false", "FALSE", "False"])
def test_false(text: str) -> None:
    assert boolean(text) is False


@pytest.mark.parametrize("text", ["", "yes", "no", "tRUE", " true", "2", "on"])
def test_no_boolean(text: str) -> None:
    with pytest.raises(ValueError, match=r"^not a boolean: write true or false$"):
        boolean(text)


@given(st.integers(0, 2**64 - 1))
def test_whole_numbers(number: int) -> None:
    assert unsigned(str(number)) == unsigned(f"+{number}") == number


@pytest.mark.parametrize("text", ["", "x", "1.5", "1e3", " 1", "1 ", "1\n", "18446744073709551616", "0" * 20 + "1", "9" * 5000, "-1", "٣", "1_0", "--1"])  # fmt: skip
def test_no_whole_number(text: str) -> None:
    with pytest.raises(ValueError, match=r"^not a whole number: write 0 or more$"):
        unsigned(text)


# ---- syntax

FLAGS = (
    Flag("name", string, "anonymous", "What to call it."),
    Flag("wait", duration, "3s", "How long."),
    Flag("n", unsigned, "", "How many."),
    Flag("on", boolean, "", "Whether."),
    Flag("empty", string, "", "No default."),
)

VALUES = {
    "name": st.text(),
    "wait": st.integers(0, 999).map("{}ms".format),
    "n": st.integers(0, 9).map(str),
    "on": st.sampled_from(["true", "F"]),
}


@st.composite
def spelled_flags(draw: st.DrawFn) -> tuple[str, str, list[str]]:
    """A name, its value, and the arguments that give it."""
    name = draw(st.sampled_from(list(VALUES)))
    value = draw(VALUES[name])
    dashes = draw(st.sampled_from(["-", "--"]))
    if name != "on" and draw(st.booleans()):
        return name, value, [dashes + name, value]
    return name, value, [f"{dashes}{name}={value}"]


@given(st.lists(spelled_flags()), st.booleans())
def test_every_spelling_and_the_last_one_wins(given_flags: list[tuple[str, str, list[str]]], end: bool) -> None:  # fmt: skip
    arguments = [argument for _, _, spelled in given_flags for argument in spelled] + ["--"] * end
    readers = {flag.name: flag.read for flag in FLAGS}

    assert parse(arguments, FLAGS) == {name: readers[name](value) for name, value, _ in given_flags}


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ([], {}),
        (["--"], {}),
        (["-on"], {"on": True}),
        (["--on"], {"on": True}),
        (["-on=false"], {"on": False}),
        (["-on", "-n=1"], {"on": True, "n": 1}),
        (["-name="], {"name": ""}),
        (["-name", ""], {"name": ""}),
        (["-name=a=b"], {"name": "a=b"}),
        (["-name=0.0"], {"name": "0.0"}),
        (["-name==", "-n", "3"], {"name": "=", "n": 3}),
        (["-name", "-3"], {"name": "-3"}),
        (["-name", "-on"], {"name": "-on"}),
        (["-name", "--"], {"name": "--"}),
        (["-n=1", "--n=2", "-n", "3"], {"n": 3}),
    ],
)
def test_accepted(arguments: list[str], values: dict[str, object]) -> None:
    assert parse(arguments, FLAGS) == values


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stray"], 'unexpected argument "stray"'),
        ([""], 'unexpected argument ""'),
        (["-"], 'unexpected argument "-"'),
        (["--", "-n=1"], 'unexpected argument "-n=1"'),
        (
            ["-on", "false"],
            'unexpected argument "false": only flags are accepted, and a boolean\'s value goes after =$',
        ),
        (["-n=1", "x", "-n=2"], 'unexpected argument "x"'),
        (["---n=1"], 'bad flag syntax: "---n=1"'),
        (["-=1"], 'bad flag syntax: "-=1"'),
        (["--=1"], 'bad flag syntax: "--=1"'),
        (["-unknown"], "flag provided but not defined: -unknown$"),
        (["--unknown=1"], "flag provided but not defined: -unknown$"),
        (["-N=1"], "flag provided but not defined: -N$"),
        (["-nam=1"], "flag provided but not defined: -nam; the nearest is -name$"),
        (["--wiat", "3s"], "flag provided but not defined: -wiat; the nearest is -wait$"),
        (["--hlep"], "flag provided but not defined: -hlep; the nearest is -help$"),
        (["-on true"], "not defined: -on true: flag and value are one item: write -on=true$"),
        (
            ["--name a=b --n=1"],
            "flag and value are one item: write -name=a=b --n=1, or make them two items$",
        ),
        (["-name "], "flag and value are one item: write -name=, or"),
        (["-Xname x"], "flag provided but not defined: -Xname x; the nearest is -name$"),
        (["-nothing x"], "flag provided but not defined: -nothing x$"),
        (["-" + "x" * 5000], r"-x+\.\.\. \(cut, 5000 bytes in all\)$"),
        (["x" * 5000], r"unexpected argument \"x+\.\.\. \(cut, 5000 bytes in all\)\""),
        (["---" + "x" * 5000], r"bad flag syntax: \"---x+\.\.\. \(cut, 5003 bytes in all\)\"$"),
        (
            ["-n=" + "x" * 5000],
            r"value \"x+\.\.\. \(cut, 5000 bytes in all\)\" for flag -n: not a whole number",
        ),
        (["-name x" + "x" * 5000], r"write -name=x+\.\.\. \(cut, 5001 bytes in all\), or"),
        (
            ["-wait=$(WAIT)"],
            r"for flag -wait: \$\(WAIT\) was not replaced: define the variable WAIT in the container's env$",
        ),
        (
            ["-n", "${N}"],
            r"for flag -n: \$\{N\} was not replaced: in a manifest, Kubernetes replaces only \$\(N\)$",
        ),
        (["-name"], "flag needs an argument: -name$"),
        (["-on", "--wait"], "flag needs an argument: -wait$"),
        (["-n="], 'invalid value "" for flag -n: '),
        (["-n", "--on"], 'invalid value "--on" for flag -n: '),
        (["--wait=5"], 'invalid value "5" for flag -wait: missing unit'),
        (["-on="], 'invalid value "" for flag -on: '),
        (["-on=maybe"], 'invalid value "maybe" for flag -on: '),
        (["-n=x", "-n=1"], 'invalid value "x" for flag -n: '),
        (["-x\ny"], r"flag provided but not defined: -x\\ny$"),
    ],
)
def test_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(FlagError, match=said):
        parse(arguments, FLAGS)


@pytest.mark.parametrize("argument", ["-h", "--h", "-help", "--help", "-help=x"])
def test_help(argument: str) -> None:
    with pytest.raises(HelpRequested):
        parse(["-n=1", argument, "stray"], FLAGS)


def test_a_program_may_have_a_flag_of_that_name() -> None:
    assert parse(["-h=7"], [Flag("h", unsigned, "", "")]) == {"h": 7}


@given(st.lists(st.text() | st.text("-=nohelp.1 ")))
def test_junk_is_values_or_a_flag_error_of_one_line(arguments: list[str]) -> None:
    values: Mapping[str, object] = {}
    problem = ""
    try:
        values = parse(arguments, FLAGS)
    except HelpRequested:
        problem = "help"
    except FlagError as error:
        problem = str(error)

    assert problem.isprintable()
    assert values.keys() <= {flag.name for flag in FLAGS}


@pytest.mark.parametrize(
    "text", ["", "/csi/csi.sock", "$", "$()", "${}", "$CSI", "(A)", "{A}", "$(A", "$ (A)", "$(A B)"]
)
def test_no_variable(text: str) -> None:
    assert goflags.unreplaced(text) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("$(ADDRESS)", "$(ADDRESS) was not replaced: define the variable ADDRESS in the container's env"),
        ("unix://$(my.ad-dress_1)/x", "$(my.ad-dress_1) was not replaced: define the variable my.ad-dress_1"),
        ("${ADDRESS}", "${ADDRESS} was not replaced: in a manifest, Kubernetes replaces only $(ADDRESS)"),
        ("$(A):${B}", "$(A) was not replaced"),
    ],
)
def test_a_variable_that_was_not_replaced(text: str, said: str) -> None:
    assert goflags.unreplaced(text).startswith(said)


def test_description() -> None:
    assert goflags.describe(FLAGS) == (
        "  -name string\n"
        '    \tWhat to call it. (default "anonymous")\n'
        "  -wait duration\n"
        "    \tHow long. (default 3s)\n"
        "  -n uint\n"
        "    \tHow many.\n"
        "  -on\n"
        "    \tWhether.\n"
        "  -empty string\n"
        "    \tNo default."
    )


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0s"),
        (1e-9, "1ns"),
        (1.5e-6, "1.5µs"),
        (0.3, "300ms"),
        (0.999999999, "999.999999ms"),
        (1.0, "1s"),
        (59.5, "59.5s"),
        (60.0, "1m0s"),
        (90.0, "1m30s"),
        (3600.0, "1h0m0s"),
        (3661.000000001, "1h1m1.000000001s"),
        (-0.05, "-50ms"),
        (-60.0, "-1m0s"),
    ],
)
def test_durations_are_written_as_go_does(seconds: float, expected: str) -> None:
    assert goflags.written(seconds) == expected
    assert goflags.duration(expected) == seconds
