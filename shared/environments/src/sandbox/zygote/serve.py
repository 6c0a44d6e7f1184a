# The process that forks, and what it does around each child.

import os
import resource
import select
import signal
import sys
import time

RESULT_BYTES = 64 * 1024
CODE_BYTES = 256 * 1024
# From the end of a child's pipe to its own end.
EXIT_GRACE_S = 5
# Most children end sooner, and their lines, for which the pipe has room, are then read at once.
QUIET_MS = 20


class Zygote:
    def __init__(self, start):
        self.forks = 0
        self.is_init = os.getpid() == 1
        # Its own copies of the frame pipes, so that 0 and 1 can lead nowhere.
        self.input, self.output = os.dup(0), os.dup(1)
        os.dup2(DEV_NULL, 0)
        os.dup2(DEV_NULL, 1)
        # The end of a child is waited for, with a limit.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        self.kernel = Kernel(start["filters"])
        self.confines_itself = start["process"]
        self.limits = [(getattr(resource, name), value) for name, value in start["child_limits"]]
        if self.confines_itself:
            self.kernel.set(PR_SET_NO_NEW_PRIVS, 1)
            self.kernel.set(PR_SET_DUMPABLE, 0)
        for name, value in start["limits"]:
            lower(getattr(resource, name), value)
        if start["nice"]:
            os.nice(start["nice"])

    def confine(self, cpu_s):
        """In the child: what is left of the layers when the zygote has its own."""
        os.close(self.input)
        os.close(self.output)
        os.dup2(DEV_NULL, 2)
        os.close(DEV_NULL)
        os.setpgid(0, 0)
        if self.confines_itself:
            self.kernel.set(PR_SET_PDEATHSIG, signal.SIGKILL)
        if cpu_s is not None:
            lower(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)
        for which, value in self.limits:
            lower(which, value)
        self.kernel.load_filters()

    def child(self, request, work, record, answer):
        """Never returns: the exit value tells that nothing ended the child before its work was done."""
        # By a name that programs cannot reach through the module.
        value, leave = 1, os._exit

        def say(line):
            os.write(record, line)

        try:
            try:
                self.confine(request["cpu_s"])
            except BaseException as error:
                say(b"F %s\n" % repr(error).encode("ascii", "backslashreplace")[:200])
                leave(value)
            say(b"R\n")
            sys.setrecursionlimit(depth() + PROGRAM_FRAMES + 1)
            try:
                work(request, say)
            except BaseException as error:
                say(b"X escaped_with_%s\n" % class_name(error))
            value = answer
        finally:
            leave(value)

    def evaluate(self, request, work):
        """Forks a child for `request` and gives the reply without its id."""
        answer = 64 + os.urandom(1)[0] % 128
        reader, writer = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(reader)
            os.close(writer)
            return {"status": "sandbox_failed", "detail": f"fork: {error.strerror}"}
        if pid == 0:
            os.close(reader)
            self.child(request, work, writer, answer)
        os.close(writer)
        self.forks += 1
        deadline = time.monotonic() + request["wall_s"]
        text, trouble = self.collect(reader, deadline)
        os.close(reader)
        status = self.reap(pid, deadline if trouble is None else 0)
        return judge(text, trouble, status, answer, len(request["tests" if "tests" in request else "pairs"]))

    def collect(self, reader, deadline):
        """Reads the child's lines to their end, the cap or the deadline."""
        poll = select.poll()
        poll.register(self.input, 0)
        # Without events it tells of the end alone.
        poll.register(reader, 0)
        ready = poll.poll(QUIET_MS)
        poll.modify(reader, select.POLLIN)
        text = b""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return text, "was killed at its deadline"
            for descriptor, _ in ready or poll.poll(left * 1000):
                if descriptor == self.input:
                    # Nobody waits for an answer any more.
                    os._exit(0)
                piece = os.read(reader, 65536)
                if not piece:
                    return text, None
                text += piece
                if len(text) > RESULT_BYTES:
                    return text, "wrote more than it may"

    def reap(self, pid, deadline):
        """Waits for the child's end, ends it if it must, and with it all that it may have started."""
        deadline = min(deadline, time.monotonic() + EXIT_GRACE_S)
        # Not reaped yet, so that the number of its group stays its own.
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                kill(pid)
                break
            signal.sigtimedwait([signal.SIGCHLD], left)
        kill(-pid)
        _, status = os.waitpid(pid, 0)
        # Orphans in a namespace of processes belong to the first one in it, so if it has no child there is none.
        try:
            while True:
                if os.waitpid(-1, os.WNOHANG)[0]:
                    continue
                if not self.is_init:
                    break
                kill(-1)
                signal.sigtimedwait([signal.SIGCHLD], EXIT_GRACE_S)
        except ChildProcessError:
            pass
        return status

    def serve(self, work):
        """Answers requests until nobody is left to ask."""
        while True:
            request = receive(self.input)
            if request is None:
                return
            if request["kind"] == "ping":
                reply = {"status": "pong"}
            else:
                reply = self.admit(request, work)
            reply["id"] = request["id"]
            reply["forks"] = self.forks
            reply["rss_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            send(self.output, reply)

    def admit(self, request, work):
        texts = [request["code"]] if "code" in request else [side for pair in request["pairs"] for side in pair]
        size = sum(map(len, texts))
        if size > CODE_BYTES:
            return {"status": "undecidable", "detail": f"it has {size} characters, more than {CODE_BYTES}"}
        return self.evaluate(request, work)


def depth():
    frame, count = sys._getframe(1), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count
