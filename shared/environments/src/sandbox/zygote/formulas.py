# Pairs of formulas, compared by sympy.

import builtins
import gc
import sys
import time


def run_sympy(request, say):
    """Says of each pair whether both sides are equal as formulas; any exception means that they are not, as in the reference."""
    say(b"S valid\n")
    for index, (left, right) in enumerate(request["pairs"]):
        start = time.monotonic_ns()
        try:
            answer = b"-" if is_equal(left, right) else b"Unequal"
        except MemoryError:
            # The reference has no such limit.
            say(b"X ran_out_of_memory\n")
            return
        except RecursionError as caught:
            # What an earlier pair left in the caches makes the way to an answer shorter.
            if len(request["pairs"]) > 1:
                say(b"X recursed_too_deeply\n")
                return
            answer = class_name(caught)
        except Exception as caught:
            answer = class_name(caught)
        say(b"T %d %d 0 %s\n" % (index, (time.monotonic_ns() - start) // 1000, answer))


def is_equal(left, right):
    # Each side has names of its own, because a text may change them. Only those that cannot come one after the other in the
    # same child; copying a thousand names would touch a thousand objects, and the memory of each.
    return SIMPLIFY(PARSE(left, global_dict=LEFT_NAMES) - PARSE(right, global_dict=RIGHT_NAMES)) == 0


def parser_names():
    """What parse_expr makes anew for each text when it is given none."""
    import sympy

    names = {}
    exec("from sympy import *", names)
    for name, value in vars(builtins).items():
        if isinstance(value, type(len)):
            names[name] = value
    names["max"], names["min"] = sympy.Max, sympy.Min
    return names


# What answers look like: parsing and simplifying them imports modules and fills tables that every child would need again.
WARM_PAIRS = [
    ("1/2", "0.5"), ("sqrt(8)", "2*sqrt(2)"), ("(x+1)**2", "x**2+2*x+1"), ("sin(x)**2+cos(x)**2", "1"), ("3!", "6"),
    ("0.3[3]", "1/3"), ("x*y-y*x", "z"), ("pi/6", "asin(1/2)"), ("exp(2)*exp(y)", "exp(2+y)"), ("log(8)/log(2)", "3"),
    ("(x**2-1)/(x-1)", "x+1"), ("10**6", "1e6"), ("x>1", "1"), ("(1,2)", "(2,1)"), ("2.5", "5*pi"), ("sqrt(2)", "1.41"),
    ("x**(1/3)", "y**0.5"), ("log(a*b)", "log(a)+log(b)"), ("abs(t)", "t"), ("1e50", "oo"), ("2j", "3*i"), ("[1]", "{1}"),
    ("binomial(6,2)", "15"), ("tan(x)", "sin(x)/cos(x)"), ("1/(x+1)+1/(x-1)", "2*x/(x**2-1)"), ("floor(2.5)", "2"),
    ("3 apples", "3"), ("n=4", "4"), ("x^2", "x"), ("50%", "1/2"), ("12 13", "7"), ("gcd(4,6)", "max(1,2)"), ("(3", "3"),
    ("sqrt(3)/2", "cos(pi/6)"), ("2**10", "1024"), ("7", "12"), ("(2+sqrt(3))**2", "7+4*sqrt(3)"), ("-3/4", "-0.75"),
]


def load_sympy(site):
    """Imports sympy and all that the usual formulas make it import; gives its version."""
    global PARSE, SIMPLIFY, LEFT_NAMES, RIGHT_NAMES
    sys.path.append(site)
    import sympy
    from sympy.parsing.sympy_parser import parse_expr

    PARSE, SIMPLIFY = parse_expr, sympy.simplify
    LEFT_NAMES, RIGHT_NAMES = parser_names(), parser_names()
    run_sympy({"pairs": WARM_PAIRS}, len)
    # A child lives too shortly for what is collected to be worth the collections; its memory is limited all the same.
    gc.set_threshold(100_000)
    return sympy.__version__
