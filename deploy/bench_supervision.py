"""The measurements of bench-supervision.sh."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

RESTARTS = 10
IDLE_SECONDS = 60
IDLE_WORKERS = 4
# A start that takes longer has failed.
LIMIT_SECONDS = 120
PAUSE_SECONDS = 0.01
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    """User and system time of a process alone, without its children."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Miner:
    """A supervisor on a fresh state directory."""

    def __init__(self, binaries, folder, workers, options=()):
        self.state = os.path.join(folder, "state")
        os.makedirs(self.state, exist_ok=True)
        command = [os.path.join(binaries, "grail-supervisor"), "mine", "--local", "--state-dir", self.state, *options]
        variables = {name: os.environ[name] for name in ("PATH", "GRAIL_LIBTORCH_DIR") if name in os.environ}
        variables |= {"HOME": folder, "GRAIL_PROOF_WORKERS": str(workers)}
        with open(os.path.join(folder, "log"), "wb") as log:
            self.process = subprocess.Popen(command, env=variables, cwd=folder, stdout=log, stderr=log)

    def events(self, kind):
        try:
            with open(os.path.join(self.state, "journal.jsonl"), encoding="utf-8") as journal:
                lines = [json.loads(line) for line in journal.read().split("\n")[:-1]]
        except FileNotFoundError:
            return []
        return [(line["unix_ms"], line["event"]) for line in lines if line["event"]["kind"] == kind]

    def wait_for(self, what, holds):
        deadline = time.monotonic() + LIMIT_SECONDS
        while not (found := holds()):
            if time.monotonic() > deadline or self.process.poll() is not None:
                sys.exit(f"error: never came: {what}; see {os.path.dirname(self.state)}/log")
            time.sleep(PAUSE_SECONDS)
        return found

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait()


@contextlib.contextmanager
def waiting_miner(binaries, workers):
    """A miner whose children are ready and whose first window is far away."""
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(os.path.join(folder, "state"))
        chain = {"schema": 1, "seed": "grail-demo", "genesis_unix_ms": int(time.time() * 1000), "genesis_block": 2990}
        with open(os.path.join(folder, "state", "chain.json"), "w", encoding="ascii") as file:
            json.dump(chain | {"block_ms": 600_000}, file)
        miner = Miner(binaries, folder, workers)
        try:
            miner.wait_for("workers are ready", lambda: len(miner.events("worker_ready")) == workers)
            miner.wait_for("the server is ready", lambda: miner.events("server_ready"))
            yield miner
        finally:
            miner.stop()


def restarts(binaries):
    """Milliseconds from kill -9 of a worker to the ready next one, with the pause before a restart in them."""
    # Each slot is killed once: a second death in a row waits longer before its restart.
    with waiting_miner(binaries, RESTARTS) as miner:
        times = []
        for _, ready in miner.events("worker_ready"):
            began = time.time() * 1000
            os.kill(ready["pid"], signal.SIGKILL)
            is_next = lambda event, slot=ready["slot"]: event["slot"] == slot and event["epoch"] == 2
            found = lambda: [at for at, event in miner.events("worker_ready") if is_next(event)]
            times.append(miner.wait_for("the next worker is ready", found)[0] - began)
        return times


def idle_share(binaries):
    """Share of one core that the supervisor takes while nothing is to be done."""
    with waiting_miner(binaries, IDLE_WORKERS) as miner:
        before, began = cpu_seconds(miner.process.pid), time.monotonic()
        time.sleep(IDLE_SECONDS)
        return (cpu_seconds(miner.process.pid) - before) / (time.monotonic() - began)


def demo_window(binaries):
    """CPU seconds of the supervisor alone in its first demo window, and the window's seconds."""
    with tempfile.TemporaryDirectory() as folder:
        miner = Miner(binaries, folder, 2, ["--windows", "1"])
        pid = miner.process.pid
        miner.wait_for("the window begins", lambda: miner.events("window_started"))
        before = after = cpu_seconds(pid)
        while miner.process.poll() is None and not miner.events("window_uploaded"):
            after = cpu_seconds(pid)
            time.sleep(PAUSE_SECONDS)
        miner.process.wait()
        (began, _), (ended, _) = miner.events("window_started")[0], miner.events("window_uploaded")[0]
        return after - before, (ended - began) / 1000, len(miner.events("group_spooled"))


def main():
    binaries = sys.argv[1]
    times = restarts(binaries)
    print(f"restart of a CPU worker to Ready: median {statistics.median(times):.0f} ms, "
          f"fastest {min(times):.0f} ms, slowest {max(times):.0f} ms of {len(times)}")
    print(f"supervisor, idle, {IDLE_WORKERS} workers, {IDLE_SECONDS} s: {100 * idle_share(binaries):.2f} % of a core")
    cpu, wall, groups = demo_window(binaries)
    print(f"supervisor, demo window of {groups} groups: {cpu:.2f} CPU seconds in {wall:.1f} s, "
          f"{100 * cpu / wall:.1f} % of a core")


if __name__ == "__main__":
    main()
