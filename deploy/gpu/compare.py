"""Compares proofs on a GPU with transformers on the same card.

    python3 deploy/gpu/compare.py --worker target/release/grail-proof-worker [--models DIR …] [--trained DIR …]
        [--shapes qwen2-1.5b,qwen2-7b] [--json FILE] [--device cpu]

For each model, groups of 16 are proved by the worker in bf16 and by transformers in float32 and in bf16 with SDPA, each sequence
alone and in a right-padded batch of 16. The worker passes if

  * its logprobs are no further from float32 than plain bf16's, in the median and at the 99th percentile,
  * no fewer of its sketches equal plain bf16's than those of plain bf16 alone and in a batch equal each other, within 2 points,
  * no fewer of its sketches equal float32's than of plain bf16's, within 2 points,
  * each of its sketches is within the validators' tolerance of plain bf16's.

Then the same comparison must refuse three mistakes: completions at shifted positions, another group's prompt, and rows that are
off by one. Shapes are filled with random weights and written to a temporary folder. Unless GRAIL_PROOF_KERNELS=off leaves out the
worker's own kernels they must be in use. Exit code 0 if all of this is so; FILE is written anew behind each model.

On a CPU the worker takes the same way as in tests, and the second condition is left out: that shows that this program runs, and
nothing about a GPU.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile

import torch
import transformers

# A beacon and its coefficients, from the golden vectors.
RANDOMNESS = "7bc43bc6beba66232f204af0d662daa843448c388b6f5eda9c0797ca27067907"
COEFFICIENTS = [-42, 97, 87, 123, -9, -78, 21, -23, -125, -44, -52, 97, 11, -54, -99, 5]
PRIME = 2147483647
THRESHOLD_BITS = [0x3FB06FE1, 0x409504F4, 0x414744FD, 0x41F80000, 0x429637F1, 0x433404F4, 0x43D6C4FD]
MEMBERS = 16
# What validators allow at the first position; later ones may differ more.
TOLERANCE = 6000
DEVICE = "cuda"
SHAPES = {
    "qwen2-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                     num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    "qwen2-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                       num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
}


def sketches(hidden):
    """Sketches of bf16 rows by the protocol: of equal magnitudes the lowest index is taken."""
    width = hidden.shape[-1]
    magnitude = hidden.to(torch.bfloat16).view(torch.int16).long() & 0x7FFF
    keys = magnitude * width + (width - 1 - torch.arange(width, device=hidden.device))
    index = (width - 1 - keys.topk(16, dim=-1).values % width).sort(-1).values
    values = hidden.gather(-1, index).float()
    thresholds = torch.tensor(THRESHOLD_BITS, dtype=torch.int32, device=hidden.device).view(torch.float32)
    buckets = (torch.bucketize(values.abs(), thresholds, right=True) * values.sign().long())
    return (buckets * torch.tensor(COEFFICIENTS, device=hidden.device)).sum(-1) % PRIME


class Result:
    """Of all completions of all groups: logprobs of their tokens, sketches of their rows."""

    def __init__(self, logprobs, sketches):
        self.logprobs, self.sketches = torch.cat(logprobs).double().cpu(), torch.cat(sketches).cpu()


@torch.inference_mode()
def forward(model, groups, batch=1, shift=0, late=0):
    """Transformers' result. `shift` moves the positions of completions, `late` reads logits and hidden states of later rows."""
    logprobs, all_sketches = [], []
    for prompt, completions in groups:
        for first in range(0, len(completions), batch):
            part = completions[first : first + batch]
            longest = len(prompt) + max(map(len, part))
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            mask = torch.zeros(len(part), longest, dtype=torch.long)
            for row, completion in enumerate(part):
                total = len(prompt) + len(completion)
                ids[row, :total] = torch.tensor(prompt + completion)
                mask[row, :total] = 1
            positions = torch.arange(longest)
            positions[len(prompt) :] += shift
            arguments = dict(position_ids=positions.expand(len(part), -1).to(DEVICE))
            if len(part) > 1:
                arguments["attention_mask"] = mask.to(DEVICE)
            hidden = model.model(input_ids=ids.to(DEVICE), use_cache=False, **arguments).last_hidden_state
            for row, completion in enumerate(part):
                start, count = len(prompt), len(completion)
                rows = hidden[row, start - 1 + late : start - 1 + late + count]
                targets = torch.tensor(completion).to(DEVICE)
                for piece in range(0, count, 512):
                    logits = model.lm_head(rows[piece : piece + 512]).float()
                    chosen = targets[piece : piece + len(logits), None]
                    logprobs.append(logits.log_softmax(-1).gather(-1, chosen)[:, 0])
                own = hidden[row, start + late : start + late + count]
                if late:
                    # The row behind the last one is not there.
                    logprobs[-1] = torch.cat([logprobs[-1], logprobs[-1][-1:].expand(count - len(rows))])
                    own = torch.cat([own, own[-1:].expand(count - len(own), -1)])
                all_sketches.append(sketches(own))
    return Result(logprobs, all_sketches)


def prove(worker, folder, *runs):
    """The worker's results of several runs of groups, and whether its own kernels computed them."""
    groups = [group for run in runs for group in run]
    lines = [
        json.dumps(dict(prompt=prompt, completions=completions, randomness=RANDOMNESS, eos_token=0))
        for prompt, completions in groups
    ]
    device = "cpu" if DEVICE == "cpu" else "cuda:0"
    command = [worker, "prove", "-", "--model", folder, "--device", device, "--dtype", "bfloat16"]
    # On a GPU the largest shape takes a minute: one that hangs must not take the time of the next.
    limit = None if DEVICE == "cpu" else 150
    try:
        done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr
        sys.exit(f"the worker did not end within {limit} s: {said}")
    if done.returncode != 0:
        sys.exit(f"the worker ended with code {done.returncode}: {done.stderr}")
    for line in done.stderr.splitlines():
        if "WARN" in line or "ERROR" in line or "ernels" in line:
            print("   worker:", line.strip(), flush=True)
    results, outputs = [], zip(groups, done.stdout.splitlines())
    for run in runs:
        logprobs, all_sketches = [], []
        for (prompt, _), line in itertools.islice(outputs, len(run)):
            for completion in json.loads(line)["completions"]:
                logprobs.append(torch.tensor(completion["logprobs"]))
                all_sketches.append(torch.tensor(completion["sketches"][len(prompt) :]))
        results.append(Result(logprobs, all_sketches))
    return results, "Own kernels are in use." in done.stderr


def errors(result, exact):
    apart = (result.logprobs - exact.logprobs).abs()
    return apart.median().item(), apart.quantile(0.99).item() if len(apart) < 1 << 24 else float("nan")


def share(a, b):
    return (a.sketches == b.sketches).double().mean().item()


def largest_distance(a, b):
    apart = (a.sketches - b.sketches) % PRIME
    return torch.minimum(apart, PRIME - apart).max().item()


class Comparison:
    def __init__(self, exact, alone, batch):
        self.exact, self.alone, self.batch, self.verdicts = exact, alone, batch, []
        self.agreement = share(alone, batch)
        self.plain = [max(pair) for pair in zip(errors(alone, exact), errors(batch, exact))]
        self.equal = min(share(alone, exact), share(batch, exact))
        # Two deviations of the difference of two samples' quantiles: of the median, and of the 99th percentile of such a tail.
        self.slack = [1 + factor / math.sqrt(len(exact.logprobs)) for factor in (3.4, 6.2)]

    def judge(self, name, result):
        """Whether the result passes; prints why."""
        found, equal = errors(result, self.exact), share(result, self.exact)
        plain = min(share(result, self.alone), share(result, self.batch))
        distance = largest_distance(result, self.alone)
        logprobs = all(ours <= plain * slack for ours, plain, slack in zip(found, self.plain, self.slack))
        # On a CPU plain bf16 rounds alike whatever the batch, and nobody else does.
        like_plain = DEVICE == "cpu" or plain >= self.agreement - 0.02
        good = logprobs and like_plain and equal >= self.equal - 0.02 and distance <= TOLERANCE
        self.verdicts.append(dict(name=name, median=found[0], p99=found[1], sketches_equal_plain=plain, sketches_equal=equal,
                                  largest_distance=distance, passes=good))
        print(f"   {name:<24} median {found[0]:.4f} p99 {found[1]:.4f}  sketches of plain bf16 {plain * 100:.1f} %, of float32 "
              f"{equal * 100:.1f} %, largest distance {distance}  {'passes' if good else 'is refused'}", flush=True)
        return good


def drawn_groups(vocab, prompt, mean, count, limit, seed=3):
    random = torch.Generator().manual_seed(seed)
    tokens = lambda length: torch.randint(0, vocab, (length,), generator=random).tolist()
    length = lambda: int((torch.randn((), generator=random) * 0.5 + math.log(mean) - 0.125).exp().clamp(4, limit))
    return [(tokens(prompt), [tokens(length()) for _ in range(MEMBERS)]) for _ in range(count)]


@torch.inference_mode()
def sampled_groups(model, prompt, length, count):
    """Completions that the model itself draws: its own tokens are what it sees in earnest."""
    groups = []
    for prompt_tokens, _ in drawn_groups(model.config.vocab_size, prompt, length, count, length):
        ids = torch.tensor([prompt_tokens] * MEMBERS).to(DEVICE)
        for _ in range(length):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        groups.append((prompt_tokens, [row[prompt:].tolist() for row in ids]))
    return groups


def compare(worker, name, folder, model, groups):
    """What came of a model, as a document."""
    tokens = sum(len(completion) for _, completions in groups for completion in completions)
    print(f"{name}: {len(groups)} groups, {tokens} completion tokens", flush=True)
    # The same completions behind each other's prompts.
    swapped = [(groups[(at + 1) % len(groups)][0], completions) for at, (_, completions) in enumerate(groups)]
    (ours, foreign), own_kernels = prove(worker, folder, groups, swapped)
    alone, batch = forward(model, groups), forward(model, groups, batch=MEMBERS)
    shifted, late = forward(model, groups, shift=7), forward(model, groups, late=1)
    exact = forward(model.float(), groups)
    comparison = Comparison(exact, alone, batch)
    print(f"   {'plain bf16':<24} median {comparison.plain[0]:.4f} p99 {comparison.plain[1]:.4f}  sketches of plain bf16 "
          f"{comparison.agreement * 100:.1f} %, of float32 {comparison.equal * 100:.1f} %", flush=True)
    good = comparison.judge("worker", ours)
    mistakes = [("another group's prompt", foreign), ("shifted positions", shifted), ("rows off by one", late)]
    refused = [not comparison.judge(mistake, result) for mistake, result in mistakes]
    as_asked = own_kernels or DEVICE == "cpu" or os.environ.get("GRAIL_PROOF_KERNELS") == "off"
    if not as_asked:
        print("   own kernels are not in use", flush=True)
    return dict(model=name, groups=len(groups), tokens=tokens, own_kernels=own_kernels, plain=comparison.plain,
                sketches_agree=comparison.agreement, sketches_equal=comparison.equal, verdicts=comparison.verdicts,
                passes=good and all(refused) and as_asked)


def random_checkpoint(shape, folder):
    """Writes a checkpoint of random weights."""
    config = transformers.Qwen2Config(
        max_position_embeddings=32768, rope_theta=1e6, architectures=["Qwen2ForCausalLM"], **SHAPES[shape]
    )
    torch.manual_seed(5)
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=DEVICE)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.1)
            else:
                # Queries and keys that matter: with smaller ones every token attends to all others alike.
                parameter.normal_(0.0, 0.06 if "q_proj" in name or "k_proj" in name else 0.02)
    model.save_pretrained(folder)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).to(DEVICE).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--models", nargs="*", default=[], help="folders of small models")
    parser.add_argument("--trained", nargs="*", default=[], help="folders of trained models, which draw their own completions")
    parser.add_argument("--shapes", default="", help="qwen2-1.5b,qwen2-7b")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    global DEVICE
    DEVICE = arguments.device
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    print(f"{card}, torch {torch.__version__}, transformers {transformers.__version__}")
    document = dict(card=card, torch=torch.__version__, transformers=transformers.__version__, models=[])

    def compared(name, folder, groups_of):
        model = load(folder)
        document["models"].append(compare(arguments.worker, name, folder, model, groups_of(model)))
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(document, file, indent=1)

    drawn = lambda *sizes: lambda model: drawn_groups(model.config.vocab_size, *sizes)
    for folder in arguments.models:
        compared(os.path.basename(folder.rstrip("/")), folder, drawn(40, 60, 4, 120))
    for folder in arguments.trained:
        compared(folder, folder, lambda model: sampled_groups(model, 40, 60, 16))
    for shape in filter(None, arguments.shapes.split(",")):
        folder = tempfile.mkdtemp(prefix=f"grail-compare-{shape}-")
        try:
            random_checkpoint(shape, folder)
            compared(shape, folder, drawn(200, 400, 2, 1500))
        finally:
            shutil.rmtree(folder)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    good = all(model["passes"] for model in document["models"])
    print("all as it should be" if good else "FAILED")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
