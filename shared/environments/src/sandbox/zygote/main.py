import gc
import os
import resource
import sys


def main():
    global DEV_NULL
    if sys.argv[1] == "inspect":
        return inspect(sys.argv[2])
    DEV_NULL = int(sys.argv[1])
    os.environ.clear()
    start = receive(0)
    if start is None:
        return
    zygote = Zygote(start)
    hello = {"id": 0, "status": "hello", "python": "%d.%d.%d" % sys.version_info[:3], "sympy": None}
    if start["site"] is None:
        work = run_program
        warm_up_programs()
    else:
        hello["sympy"] = load_sympy(start["site"])
        work = run_sympy
    # Collections in children would otherwise write to all that is here, and so copy it.
    gc.collect()
    make_immortal()
    gc.freeze()
    hello["rss_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hello["forks"] = 0
    send(zygote.output, hello)
    zygote.serve(work)


main()
