"""Measures proofs on a GPU and, in the same run on the same card, transformers beside them.

    python3 deploy/gpu/bench.py --worker target/release/grail-proof-worker [--rounds 5] [--minutes 4] [--json FILE]

Each round goes through all cases of a model, then through the baseline, so that heat and clocks fall on both alike; the table
has medians of the rounds. The baseline pads each group to its longest rollout, repeats the prompt for each of the sixteen,
computes all logits, and takes log-softmax in float32 over 512 rows at a time; it empties no cache. torch and transformers are
those of the python3 that runs this. FILE is written anew behind each round, and no round begins that would end behind --minutes.

`--device cpu --models qwen2-0.5b` shows in a few minutes that this program runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import transformers

LOGPROB_ROWS = 512
SHAPES = {
    "qwen2-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                     num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    "qwen2-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                       num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                       num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
}
# Groups of a small model take less time, so it gets more of them.
MORE_GROUPS = {"qwen2-1.5b": 4}
DEVICE = "cuda"
USUAL = ("800 / 200", dict(prompt="fixed:200", completion="lognormal:800,0.5"))
CASES = {
    "qwen2-7b": [
        USUAL,
        ("400 / 200", dict(prompt="fixed:200", completion="lognormal:400,0.5")),
        ("1,500 / 200", dict(prompt="fixed:200", completion="lognormal:1500,0.5")),
        ("800 / 50", dict(prompt="fixed:50", completion="lognormal:800,0.5")),
        ("800 / 500", dict(prompt="fixed:500", completion="lognormal:800,0.5")),
        ("fixed 1,000 in all", dict(prompt="fixed:200", completion="fixed:800")),
        ("800 / 200, one of 8,192", dict(prompt="fixed:200", completion="lognormal:800,0.5", longest=8192)),
    ],
    "qwen2-1.5b": [USUAL],
    "qwen2-0.5b": [("8 / 8", dict(prompt="fixed:8", completion="fixed:8"))],
}


class Worker:
    """A profile that waits for cases; the model is loaded once."""

    def __init__(self, program, shape, batch_tokens):
        command = [program, "profile", "--shape", shape, "--device", "cuda:0" if DEVICE == "cuda" else "cpu", "--cases", "-"]
        if batch_tokens:
            command += ["--batch-tokens", str(batch_tokens)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, case):
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the worker ended with code {self.process.wait()}; what it says is above")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Baseline:
    """Random weights of a shape in transformers, bf16 with SDPA."""

    def __init__(self, shape):
        config = transformers.Qwen2Config(max_position_embeddings=32768, rope_theta=1e6, **SHAPES[shape])
        config._attn_implementation = "sdpa"
        torch.manual_seed(1)
        with torch.device("meta"):
            model = transformers.Qwen2ForCausalLM(config)
        model = model.to(torch.bfloat16).to_empty(device=DEVICE)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
        # Buffers are not made on the meta device.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(DEVICE)
        model.tie_weights()
        self.model = model.eval()

    @torch.inference_mode()
    def prove(self, lengths):
        prompt, completions = lengths[0], lengths[1:]
        longest = prompt + max(completions)
        ids = torch.randint(0, self.model.config.vocab_size, (len(completions), longest), device=DEVICE)
        totals = torch.tensor([prompt + own for own in completions], device=DEVICE)
        mask = (torch.arange(longest, device=DEVICE)[None] < totals[:, None]).long()
        hidden = self.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden.abs().topk(16, dim=-1)
        logits = self.model.lm_head(hidden)
        for row, own in enumerate(completions):
            rows = logits[row, prompt - 1 : prompt + own - 1]
            chosen = ids[row, prompt : prompt + own, None]
            for first in range(0, own, LOGPROB_ROWS):
                part = rows[first : first + LOGPROB_ROWS].float().log_softmax(-1)
                part.gather(-1, chosen[first : first + LOGPROB_ROWS])
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def rollouts_per_second(self, groups):
        started = time.perf_counter()
        for lengths in groups:
            self.prove(lengths)
        return sum(len(lengths) - 1 for lengths in groups) / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="qwen2-7b,qwen2-1.5b")
    parser.add_argument("--groups", type=int, default=2, help="groups of 16 in each pass")
    parser.add_argument("--repeats", type=int, default=2, help="passes in each measurement")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--minutes", type=float, default=60.0, help="for each model, from its first round on")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    global DEVICE
    DEVICE = arguments.device
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    document = dict(card=card, torch=torch.__version__, transformers=transformers.__version__, models={})
    print(f"{card}, torch {torch.__version__}, transformers {transformers.__version__}, medians of {arguments.rounds} rounds")
    print("| model, completion / prompt | rollouts/s | useful TFLOP/s | 8192³ | share | baseline rollouts/s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for shape in arguments.models.split(","):
        measure(arguments, shape, document)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def measure(arguments, shape, document):
    worker = Worker(arguments.worker, shape, arguments.batch_tokens)
    baseline = None if arguments.no_baseline else Baseline(shape)
    usual = CASES[shape][0][0]
    reports, rates = {name: [] for name, _ in CASES[shape]}, []
    document["models"][shape] = dict(reports=reports, baseline=rates)
    began = time.perf_counter()
    for turn in range(arguments.rounds):
        for name, case in CASES[shape]:
            groups = arguments.groups * MORE_GROUPS.get(shape, 1)
            line = dict(case, groups=groups, repeats=arguments.repeats, warm_up=1, stages=turn == 0)
            reports[name].append(worker.measure(line))
        if baseline:
            groups = reports[usual][-1]["groups"]["lengths"]
            if turn == 0:
                baseline.rollouts_per_second(groups[:1])
            rates.append(baseline.rollouts_per_second(groups))
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(document, file)
        elapsed = (time.perf_counter() - began) / 60
        if elapsed * (turn + 2) / (turn + 1) > arguments.minutes and turn + 1 < arguments.rounds:
            print(f"{shape}: {turn + 1} rounds took {elapsed:.1f} minutes, no more begin")
            break
    worker.close()
    table(shape, usual, reports, rates)


def table(shape, usual, reports, rates):
    median = lambda name, field: statistics.median(report[field] for report in reports[name])
    for name in reports:
        product = statistics.median(report["matrix_product"]["tflops"] for report in reports[name])
        row = [f"{shape}, {name}", f"{median(name, 'rollouts_per_second'):.1f}", f"{median(name, 'useful_tflops'):.0f}",
               f"{product:.0f}", f"{median(name, 'share_of_matrix_product') * 100:.1f} %"]
        if rates and name == usual:
            rate = statistics.median(rates)
            row += [f"{rate:.1f}", f"{median(name, 'rollouts_per_second') / rate:.1f}"]
        else:
            row += ["", ""]
        print("| " + " | ".join(row) + " |", flush=True)
    first = reports[usual][0]
    product = first["matrix_product"]
    for what, when in [("at_start_tflops", "before the first pass"), ("sustained_tflops", "for a second on end")]:
        if product[what]:
            print(f"\n{shape}: 8192³ {when} {product[what]:.0f} TFLOP/s", flush=True)
    print(f"stages of {shape}, {usual}:")
    for stage in first["stages"]:
        print(f"    {stage['stage']:<14}{stage['ms_per_group']:>9.2f} ms a group{stage['share'] * 100:>7.1f} %", flush=True)


if __name__ == "__main__":
    main()
