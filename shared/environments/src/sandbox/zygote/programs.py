# Programs and their tests: what they may use, how long they may take, and what their outcome may hang on.

# Programs import these by name; loading them here makes that cheap.
import bisect
import builtins
import collections
import collections.abc
import functools
import heapq
import itertools
import math
import opcode
import operator
import re
import resource
import signal
import string
import time

FUTURE_ANNOTATIONS = 0x1000000
# An alarm that comes when a test has had nearly all its time ends it. On a busy machine it comes again, until the test has
# had its time or has been waiting this many times as long.
ALARM_TOLERANCE_S = 0.5
MOST_BUSY = 3
UNUSUAL = re.compile(rb"[^A-Za-z0-9_.]")
# Frames that a program may use: its module and 992 calls, as in the reference, whose workers use seven of 1000.
PROGRAM_FRAMES = 993

ALLOWED_BUILTINS = """
AssertionError BaseException Exception False IndexError KeyError None StopIteration True TypeError ValueError
ZeroDivisionError __build_class__ abs all any bin bool bytearray bytes chr complex dict divmod enumerate filter float format
frozenset hex int isinstance len list map max min object oct ord pow print range repr reversed round set slice sorted str sum
tuple type zip
""".split()
ALLOWED_IMPORTS = frozenset(
    ["math", "itertools", "functools", "collections", "heapq", "bisect", "operator", "re", "string"]
)

# What makes an outcome depend on the hash seed or on addresses, which differ between interpreters: sets in whatever way they
# are made, and hashes and addresses themselves.
UNORDERED_NAMES = frozenset(["set", "frozenset", "id", "hash", "__hash__"])
UNORDERED_OPCODES = tuple(opcode.opmap[name] for name in ("BUILD_SET", "SET_ADD", "SET_UPDATE"))
# Views of a dict combine to sets: by operators, also where the views were made in another function, or by their names.
VIEWS = frozenset(["keys", "items"])
OPERATOR_NAMES = frozenset(
    word for name in ("and", "or", "xor", "sub") for word in (f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__")
) | {"sub", "xor"}


def operators(*signs):
    return frozenset(index for index, (_, sign) in enumerate(opcode._nb_ops) if sign in signs)


BIT_OPERATORS = operators("&", "|", "^", "&=", "|=", "^=")
SET_OPERATORS = BIT_OPERATORS | operators("-", "-=")
BINARY_OP, LOAD_CONST, GET_ITER = (opcode.opmap[name] for name in ("BINARY_OP", "LOAD_CONST", "GET_ITER"))


class Timeout(Exception):
    """Raised inside a program when a test has had its time."""


def import_allowed(name, globals=None, locals=None, fromlist=(), level=0):
    if name not in ALLOWED_IMPORTS and name.split(".")[0] not in ALLOWED_IMPORTS:
        raise ImportError(f"Module '{name}' is not allowed in sandboxed execution")
    return __import__(name, globals, locals, fromlist, level)


PROGRAM_BUILTINS = {name: getattr(builtins, name) for name in ALLOWED_BUILTINS}
PROGRAM_BUILTINS["__import__"] = import_allowed


def class_name(error):
    """Name of the class of `error`, whatever the class does to hide it, as one word that is no mark of ours."""
    name = type.__dict__["__name__"].__get__(type(error))
    return UNUSUAL.sub(b"_", name[:100].encode("ascii", "replace")) or b"_"


def compiled(text):
    return compile(text, "<string>", "exec", FUTURE_ANNOTATIONS, True)


def is_unordered(program):
    """Whether `program` may iterate over a set, or look at hashes or addresses. Asking a constant set for a member is neither.
    Addresses in the texts that objects have by default are not seen."""
    has_views = has_operators = False
    codes = [program]
    while codes:
        code = codes.pop()
        names, operations, arguments = code.co_names, code.co_code[::2], code.co_code[1::2]
        if not UNORDERED_NAMES.isdisjoint(names) or any(number in operations for number in UNORDERED_OPCODES):
            return True
        has_own_views = not VIEWS.isdisjoint(names)
        if has_own_views and has_operator(operations, arguments, SET_OPERATORS):
            return True
        has_views = has_views or has_own_views
        # A minus elsewhere is nearly always one of numbers.
        has_operators = (
            has_operators
            or not OPERATOR_NAMES.isdisjoint(names)
            or has_operator(operations, arguments, BIT_OPERATORS)
        )
        for constant in code.co_consts:
            if isinstance(constant, type(code)):
                codes.append(constant)
            elif isinstance(constant, str):
                # Also names can be looked up by their text.
                if constant in UNORDERED_NAMES:
                    return True
            elif isinstance(constant, frozenset) and iterates_constant(code, operations, arguments):
                return True
    return has_views and has_operators


def has_operator(operations, arguments, wanted):
    return BINARY_OP in operations and any(
        number == BINARY_OP and arguments[at] in wanted for at, number in enumerate(operations)
    )


def iterates_constant(code, operations, arguments):
    """Whether `code` goes through a set that the compiler made a constant of. Of the index only the low byte is looked at, so
    that another constant may be taken for it."""
    sets = {index & 255 for index, constant in enumerate(code.co_consts) if isinstance(constant, frozenset)}
    follows = zip(operations, arguments, operations[1:])
    return any(one == LOAD_CONST and index in sets and two == GET_ITER for one, index, two in follows)


class Alarm:
    """The time limit of one test; `rang` says that it ended the test, or tried to."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.rang = False
        signal.signal(signal.SIGALRM, self.ring)

    def start(self):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.cpu, self.switches = usage.ru_utime + usage.ru_stime, usage.ru_nvcsw
        self.began = time.monotonic()
        self.rang = False
        signal.alarm(self.seconds)

    def elapsed(self):
        """Seconds that the test would have taken on a machine with nothing else to do: those of the clock if it ever waited
        for something, else those that it had the CPU."""
        wall = time.monotonic() - self.began
        usage = resource.getrusage(resource.RUSAGE_SELF)
        if usage.ru_nvcsw != self.switches:
            return wall
        return min(wall, usage.ru_utime + usage.ru_stime - self.cpu)

    def ring(self, *_):
        left = self.seconds - self.elapsed()
        if left > ALARM_TOLERANCE_S and time.monotonic() - self.began < self.seconds * MOST_BUSY:
            # Others have the CPU.
            signal.alarm(math.ceil(left))
            return
        self.rang = True
        raise Timeout


def run_program(request, say):
    """Compiles the code, then runs it with each test: one line for the syntax and one per test."""
    code = request["code"]
    try:
        compiled(code)
        syntax = b"valid"
    except SyntaxError:
        syntax = b"invalid"
    except Exception:
        syntax = b"compiler_failed"
    say(b"S %s\n" % syntax)
    if syntax != b"valid":
        return
    alarm = Alarm(request["time_s"])
    shared = dict(PROGRAM_BUILTINS)
    for index, test in enumerate(request["tests"]):
        error, program = b"-", None
        alarm.start()
        try:
            program = compiled(code + "\n\n" + test)
            exec(program, {"__builtins__": shared})
        except Timeout:
            error = b"Timeout"
        except Exception as caught:
            error = class_name(caught)
        signal.alarm(0)
        if alarm.rang and error != b"Timeout":
            say(b"X swallowed_its_time_limit\n")
            return
        micros = int(alarm.elapsed() * 1e6)
        # Also of a test that failed: elsewhere it may pass. One that was not compiled fails everywhere.
        is_open = program is not None and is_unordered(program)
        say(b"T %d %d %d %s\n" % (index, micros, is_open, error))


WARM_CODE = """
import math
from collections import Counter
def f(xs: Unknown, n: int = 1) -> int:
    total = 0
    for index, value in enumerate(sorted(xs, key=lambda v: -v)):
        if value % 2 == 0 and not value in (4, 6):
            total += value ** 2 // n
        elif str(value).isdigit():
            total -= len([c for c in f"{value:03d}" if c != "0"])
    while n > 0:
        n -= 1
    return {"total": total, "other": (math.floor(2.5), max(xs))}["total"]
"""
WARM_TESTS = [
    "def check(candidate):\n    assert candidate([1, 2, 3]) == 2, 'no'\n    assert True\ncheck(f)",
    "assert f([5]) == 7",
    "g = {c: c for c in (1, 2)}\nx = [*g][0]\ny = missing",
]


def warm_up_programs():
    """Has the compiler make its types, and this text its shortcuts, once: each child would pay for them again."""
    for _ in range(8):
        run_program({"code": WARM_CODE, "tests": WARM_TESTS, "time_s": 5}, len)
    for text in ("(", "def f(:", "x = 'a\n"):
        run_program({"code": text, "tests": [], "time_s": 5}, len)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
