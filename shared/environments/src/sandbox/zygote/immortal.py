# What is here before the first fork, made so that children can look at it without writing to it.

import ctypes
import gc
import sys
import types

# What CPython 3.12 has in the place of a count of references that is never changed.
IMMORTAL = (0xFFFFFFFF).to_bytes(8, sys.byteorder)
# What a code object refers to and does not tell the collector.
CODE_PARTS = [
    "co_consts", "co_names", "co_varnames", "co_cellvars", "co_freevars", "co_filename", "co_name", "co_qualname", "co_linetable",
    "co_exceptiontable",
]


def make_immortal():
    """Has CPython count no references to anything that is here now.

    Counting writes to an object, also where a program merely looks at it, so that every child would copy the memory of all that
    it looks at. Nothing that is here ends before the process does. No program can tell, since none can ask for a count."""
    if sys.version_info[:2] != (3, 12) or sys.maxsize != 2**63 - 1:
        return
    # The list is not among the objects, nor is what is made after it.
    queue = gc.get_objects()
    known = set()
    while queue:
        found = queue.pop()
        if id(found) in known:
            continue
        known.add(id(found))
        ctypes.memmove(id(found), IMMORTAL, len(IMMORTAL))
        queue.extend(gc.get_referents(found))
        if isinstance(found, types.CodeType):
            queue.extend(getattr(found, part) for part in CODE_PARTS)
