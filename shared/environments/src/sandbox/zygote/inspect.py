# What this interpreter is and what it reads of its host.

import json
import math
import os
import resource
import select
import sys


def inspect(site):
    """Prints what this interpreter is and what it reads, once all that it ever imports is loaded. Run outside of a sandbox."""
    warm_up_programs()
    sympy = load_sympy(site)
    executable = os.path.realpath(sys.executable)
    folders = [os.path.dirname(os.path.realpath(os.__file__))]
    for module in (math, resource, select):
        # Some are part of the executable.
        folder = os.path.dirname(os.path.realpath(getattr(module, "__file__", None) or os.__file__))
        if not any(folder == known or folder.startswith(known + "/") for known in folders):
            folders.append(folder)
    files = {executable, program_loader(executable)}
    with open("/proc/self/maps") as maps:
        mapped = {line.split(None, 5)[5].rstrip("\n") for line in maps if line.count("/")}
    for path in mapped:
        # Shared memory and files that were replaced meanwhile are no libraries.
        if os.path.isfile(path) and (".so" in path):
            files.add(path)
            files.update(other_names(path))
    if os.path.exists("/etc/ld.so.cache"):
        files.add("/etc/ld.so.cache")
    below = tuple(folder + "/" for folder in folders)
    files = sorted(path for path in files if path and not path.startswith(below))
    version = "%d.%d.%d" % sys.version_info[:3]
    print(json.dumps({"python": version, "sympy": sympy, "executable": executable, "folders": folders, "files": files}))


def other_names(path):
    """Links beside `path` that mean it: a loader asks for libfoo.so.1 where the file is libfoo.so.1.2.3."""
    folder, stem = os.path.dirname(path), os.path.basename(path).split(".so")[0]
    for name in os.listdir(folder):
        link = os.path.join(folder, name)
        if name.startswith(stem) and os.path.islink(link) and os.path.realpath(link) == path:
            yield link


def program_loader(executable):
    """What the kernel is told to start before `executable`, as its ELF header says; None if it needs nothing."""
    with open(executable, "rb") as file:
        head = file.read(64)
        if head[:5] != b"\x7fELF\x02":
            return None
        offset = int.from_bytes(head[32:40], "little")
        size, count = (int.from_bytes(head[at:at + 2], "little") for at in (54, 56))
        for index in range(count):
            file.seek(offset + index * size)
            entry = file.read(size)
            if int.from_bytes(entry[:4], "little") == 3:
                file.seek(int.from_bytes(entry[8:16], "little"))
                return file.read(int.from_bytes(entry[32:40], "little")).rstrip(b"\0").decode()
    return None
