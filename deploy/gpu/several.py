"""Measures what several GPUs of one host prove together: one worker on each, alone and all at once.

    python3 deploy/gpu/several.py --worker target/release/grail-proof-worker [--shape qwen2-7b] [--rounds 5] [--json FILE]

Each round lets every worker prove alone, one after the other, and then all of them together; the ratio is the sum of the rates
together over the mean of the rates alone. Each worker sees its own GPU only, as the supervisor starts them. Medians of the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading

import torch

CASE = dict(prompt="fixed:200", completion="lognormal:800,0.5", groups=4, repeats=4, warm_up=1, stages=False)


class Worker:
    """A profile on one GPU that waits for cases; the model is loaded once."""

    def __init__(self, program, shape, gpu):
        command = [program, "profile", "--shape", shape, "--device", "cuda:0", "--cases", "-"]
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES=str(gpu))
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.rate = None

    def measure(self):
        """Rollouts a second."""
        self.process.stdin.write(json.dumps(CASE) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a worker ended with code {self.process.wait()}; what it says is above")
        self.rate = json.loads(line)["rollouts_per_second"]
        return self.rate

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def together(workers):
    threads = [threading.Thread(target=worker.measure) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [worker.rate for worker in workers]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--shape", default="qwen2-7b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    if gpus < 2:
        sys.exit(f"this host has {gpus} GPUs: nothing to compare")
    workers = [Worker(arguments.worker, arguments.shape, gpu) for gpu in range(gpus)]
    print(f"{gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.shape}")
    rounds = []
    for _ in range(arguments.rounds):
        alone = [worker.measure() for worker in workers]
        all_at_once = together(workers)
        ratio = sum(all_at_once) / statistics.mean(alone)
        rounds.append(dict(alone=alone, together=all_at_once, ratio=ratio))
        rates = lambda values: " ".join(f"{value:.1f}" for value in values)
        print(f"   alone {rates(alone)}, together {rates(all_at_once)} rollouts/s: {ratio:.3f} of one", flush=True)
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(dict(gpus=gpus, shape=arguments.shape, rounds=rounds), file)
    for worker in workers:
        worker.close()
    print(f"{gpus} workers prove {statistics.median(entry['ratio'] for entry in rounds):.3f} times what one does")


if __name__ == "__main__":
    main()
