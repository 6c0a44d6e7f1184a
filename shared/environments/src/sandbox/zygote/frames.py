"""The evaluator's interpreter: imports what programs may use, then forks one child per request and reports what it did.

Frames are a little-endian u32 and that many bytes of JSON, in on descriptor 0 and out on descriptor 1. This process never
runs text that a model wrote: the children do, and all that they can say to it are short lines through a pipe.

The text is in parts, joined in this order: frames, records, programs, formulas, kernel, serve, inspect, main.
"""

import json
import os

REQUEST_BYTES = 16 * 1024 * 1024


def receive(descriptor):
    """One frame; None at the end of the input."""
    header = read_exactly(descriptor, 4)
    if header is None:
        return None
    length = int.from_bytes(header, "little")
    if length > REQUEST_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    body = read_exactly(descriptor, length)
    return None if body is None else json.loads(body)


def read_exactly(descriptor, count):
    pieces = []
    while count:
        piece = os.read(descriptor, min(count, 1 << 20))
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def send(descriptor, message):
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    rest = len(body).to_bytes(4, "little") + body
    while rest:
        rest = rest[os.write(descriptor, rest):]
