# What a child says: lines, each written only once what it tells of has happened.
#
#   R                          it is confined and begins
#   F REASON                   it could not be confined
#   S SYNTAX                   the code alone is valid, invalid, or more than the compiler bears
#   T INDEX MICROS OPEN ERROR  a test or a pair: its time, whether it may come out otherwise elsewhere, `-` or a class
#   X REASON                   there can be no verdict

import os

SYNTAXES = (b"valid", b"invalid", b"compiler_failed")


def judge(text, trouble, status, answer, count):
    """The reply for what a child said and how it ended. Anything but the expected lines in order gives no verdict."""
    lines = text.split(b"\n")
    complete = lines.pop() == b""
    if not lines or lines[0] != b"R":
        said = text[:300].decode("ascii", "replace").strip()
        return {"status": "sandbox_failed", "detail": said or f"the child ended before it began: {ended(status)}"}
    if trouble is None and os.WIFSIGNALED(status):
        trouble = ended(status)
    for line in lines:
        if line.startswith(b"X ") and trouble is None:
            trouble = line[2:200].decode("ascii", "replace").replace("_", " ")
    if trouble is not None:
        return {"status": "undecidable", "detail": trouble}
    if not complete or not os.WIFEXITED(status) or os.WEXITSTATUS(status) != answer:
        return {"status": "undecidable", "detail": f"it ended its process: {ended(status)}"}
    try:
        return parse(lines[1:], count)
    except (ValueError, IndexError, UnicodeDecodeError):
        return {"status": "undecidable", "detail": "its records are not in order"}


def parse(lines, count):
    mark, syntax = lines[0].split(b" ")
    if mark != b"S" or syntax not in SYNTAXES:
        raise ValueError
    unordered = False
    tests = []
    for index, line in enumerate(lines[1:]):
        mark, number, micros, is_open, error = line.split(b" ")
        if mark != b"T" or int(number) != index or not 0 <= int(micros) < 1 << 40:
            raise ValueError
        unordered = unordered or is_open != b"0"
        tests.append({"error_class": None if error == b"-" else error.decode("ascii"), "wall_us": int(micros)})
    if len(tests) != (count if syntax == b"valid" else 0):
        raise ValueError
    return {"status": "done", "syntax": syntax.decode(), "tests": tests, "unordered": unordered}


def ended(status):
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return "exit value of its own choice" if os.WEXITSTATUS(status) != 1 else "exit value 1"
