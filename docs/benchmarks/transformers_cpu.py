"""Proof tokens a second of Python's transformers on the CPU: the yardstick for `cargo bench -p grail-model --bench proof`.

Usage: transformers_cpu.py MODEL_DIR [THREADS]

Needs torch 2.11.0 and transformers 4.57.1. Groups, lengths and ids are those of the benchmark in shared/model/benches/proof.rs; what
is timed is the reference's work on them: one padded batch of 16 whole sequences, hidden states, all logits, log-softmax in
float32, gather. Sketches are left out, in transformers' favour.
"""

import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM

PROMPT_TOKENS, MEMBERS, RUNS = 150, 16, 10

torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="sdpa").eval()
vocab_size = model.config.vocab_size


def tokens(seed, count):
    return [(seed * 7919 + index * index * 31 + index) % vocab_size for index in range(count)]


@torch.inference_mode()
def prove(ids, mask):
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, PROMPT_TOKENS - 1 : -1])
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    return hidden, logprobs.gather(-1, ids[:, PROMPT_TOKENS:, None])


for completion_tokens in (64, 150, 400):
    prompt = tokens(1, PROMPT_TOKENS)
    ids = torch.tensor([prompt + tokens(seed + 2, completion_tokens) for seed in range(MEMBERS)])
    mask = torch.ones_like(ids)
    prove(ids, mask)
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        prove(ids, mask)
        times.append(time.perf_counter() - began)
    median = statistics.median(times)
    rate = MEMBERS * (PROMPT_TOKENS + completion_tokens) / median
    print(f"completion {completion_tokens:4}: median {median * 1e3:8.1f} ms, {rate:9.0f} tokens/s, {torch.get_num_threads()} threads")
