"""The work of `proof.rs`'s `prove_f32` in transformers: one group of 16 on one CPU thread, each rollout with its own prompt,
as the reference proves it. Prints CPU seconds for a group and rollout tokens a CPU second.

    python3 shared/model/benches/transformers_baseline.py FOLDER        (torch 2.11, transformers 4.57)
"""

import resource
import sys
import time

import torch
from transformers import AutoModelForCausalLM

PROMPT_TOKENS, MEMBERS, REPEATS = 150, 16, 5

torch.set_num_threads(1)
torch.set_num_interop_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="sdpa").eval()
vocab_size = model.config.vocab_size


def tokens(seed: int, count: int) -> list[int]:
    return [(seed * 7919 + index * index * 31 + index) % vocab_size for index in range(count)]


def prove(completion_tokens: int) -> None:
    prompt = tokens(1, PROMPT_TOKENS)
    ids = torch.tensor([prompt + tokens(seed + 2, completion_tokens) for seed in range(MEMBERS)])
    with torch.inference_mode():
        hidden = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        hidden.abs().topk(16, dim=-1)
        rows = model.lm_head(hidden)[:, PROMPT_TOKENS - 1 : -1].reshape(-1, vocab_size)
        chosen = ids[:, PROMPT_TOKENS:].reshape(-1, 1)
        for first in range(0, len(rows), 512):
            torch.log_softmax(rows[first : first + 512], dim=-1).gather(1, chosen[first : first + 512])


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


for completion_tokens in (64, 150, 400):
    prove(completion_tokens)
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(REPEATS):
        prove(completion_tokens)
    wall, cpu = (time.perf_counter() - wall) / REPEATS, (cpu_seconds() - cpu) / REPEATS
    rate = MEMBERS * (PROMPT_TOKENS + completion_tokens) / cpu
    print(f"{completion_tokens} completion tokens: wall {wall:.3f} s, CPU {cpu:.3f} s, {rate:.0f} rollout tokens a CPU second")
