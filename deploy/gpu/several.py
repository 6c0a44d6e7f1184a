"""Measures what several GPUs of one host prove together: one worker on each, alone and all at once.

    python3 deploy/gpu/several.py --worker target/release/grail-proof-worker [--shape qwen2-7b] [--rounds 4] [--seconds 165]
        [--json FILE]

Each round lets every worker prove alone, one after the other, and all of them together; the ratio is the sum of the rates
together over the mean of the rates alone. A card that comes from idling is cooler and clocks higher, so before each measurement
there is the same pause, and then whoever takes part proves the same for some seconds, unmeasured. Every second round begins with
all together and goes through the workers backwards. Each worker sees its own GPU only, as the supervisor starts them. Medians of
the rounds; no round but the first begins that would end behind --seconds. A worker that dies ends the program, with an error.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

# A pass takes 1.3 s at 7B: four seconds unmeasured, then five that count.
CASE = dict(prompt="fixed:200", completion="lognormal:800,0.5", groups=4, repeats=4, warm_up=3, stages=False)
PAUSE = 1.0


class Worker:
    """A profile on one GPU that waits for cases; the model is loaded once."""

    def __init__(self, program, shape, gpu):
        command = [program, "profile", "--shape", shape, "--device", "cuda:0", "--cases", "-"]
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES=str(gpu))
        self.gpu = gpu
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def begin(self, case):
        try:
            self.process.stdin.write(json.dumps(case) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.ended()

    def finish(self):
        """Rollouts a second."""
        line = self.process.stdout.readline()
        if not line:
            self.ended()
        return json.loads(line)["rollouts_per_second"]

    def ended(self):
        sys.exit(f"error: the worker of GPU {self.gpu} ended with code {self.process.wait()}; what it says is above")


def measured(workers, case=CASE):
    """The rate of each while all of these prove at once. They need no threads of this program: a report waits in its pipe."""
    time.sleep(PAUSE)
    for worker in workers:
        worker.begin(case)
    return [worker.finish() for worker in workers]


def one_round(workers, begins_together):
    order = workers[::-1] if begins_together else workers
    together = measured(workers) if begins_together else None
    alone = {worker.gpu: measured([worker])[0] for worker in order}
    together = together or measured(workers)
    alone = [alone[worker.gpu] for worker in workers]
    return dict(alone=alone, together=together, ratio=sum(together) / statistics.mean(alone), begins_together=begins_together)


def measure(workers, arguments, until):
    # Until all have their models and have made all that the first pass makes.
    measured(workers, dict(CASE, warm_up=1, repeats=1))
    rounds, began = [], time.monotonic()
    for number in range(arguments.rounds):
        if rounds and time.monotonic() + (time.monotonic() - began) / len(rounds) > until:
            print(f"   no more rounds begin: they would end behind {arguments.seconds:.0f} s")
            break
        rounds.append(one_round(workers, number % 2 == 1))
        rates = lambda values: " ".join(f"{value:.1f}" for value in values)
        last = rounds[-1]
        print(f"   alone {rates(last['alone'])}, together {rates(last['together'])} rollouts/s: {last['ratio']:.3f} of one"
              f"{', together first' if last['begins_together'] else ''}", flush=True)
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(dict(gpus=len(workers), shape=arguments.shape, rounds=rounds), file)
    return rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--shape", default="qwen2-7b")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=165, help="for all, loading included")
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    gpus = torch.cuda.device_count()
    if gpus < 2:
        sys.exit(f"this host has {gpus} GPUs: nothing to compare")
    workers = [Worker(arguments.worker, arguments.shape, gpu) for gpu in range(gpus)]
    try:
        print(f"{gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.shape}", flush=True)
        rounds = measure(workers, arguments, until)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    print(f"{gpus} workers prove {statistics.median(entry['ratio'] for entry in rounds):.3f} times what one does")


if __name__ == "__main__":
    main()
