"""Checks and times shared/model/cuda/attend.cu on a Hopper GPU against torch's flash kernel. From the repository's root:

    python3 deploy/gpu/attend.py [--seconds 88] [--out FOLDER]

Compiles it for all heads, then runs parts in processes of their own, each with a time limit: `probes` (simple inputs whose
results say what is wrong with a layout), `check` (many layouts against float32 and against the flash kernel), `time`. A kernel that does
not come back is named and left out of what follows.
"""

import argparse
import concurrent.futures
import ctypes
import heapq
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from own_kernels import ATTEND, Compiler, lengths, resources

HEAD_DIM = 128
DEVICE = "cuda"
TILE_KEYS = 128
STAGES = 2
HEADS = [(28, 4), (12, 2), (32, 8)]
# With other macros there may be more to compare; the first is the worker's.
VARIANTS = {"default": {}}


class Shape:
    def __init__(self, heads, kv_heads, variant):
        self.heads, self.kv_heads, self.variant = heads, kv_heads, variant
        self.group = heads // kv_heads
        self.tile_rows = 128
        self.tile_queries = self.tile_rows // self.group
        self.threads = 384
        self.shared = 1024 + STAGES * (self.tile_rows * 256 + 2 * TILE_KEYS * 256) + 6 * STAGES * 8

    @property
    def macros(self):
        own = dict(HEADS=self.heads, KV_HEADS=self.kv_heads, HEAD_DIM=HEAD_DIM, **VARIANTS[self.variant])
        return [f"{name}={value}" for name, value in own.items()]

    @property
    def file(self):
        return f"attend-{self.heads}-{self.kv_heads}-{self.variant}.cubin"


def compile_one(folder, shape):
    """In a process of its own, in which no other program is compiled: NVRTC may take them one at a time."""
    image, log = Compiler().compile("90a", shape.macros, ["--ptxas-options=-v"], ATTEND)
    with open(os.path.join(folder, shape.file), "wb") as file:
        file.write(image)
    found = resources(log).get("attend", {})
    bad = [line for line in log.splitlines() if "C75" in line or "warning" in line]
    return f"{shape.file}: {found}{' BAD: ' + '; '.join(bad) if bad else ''}"


def compile_all(folder):
    shapes = [Shape(*heads, variant) for heads in HEADS for variant in VARIANTS]
    with concurrent.futures.ProcessPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for line in pool.map(compile_one, itertools.repeat(folder), shapes):
            print("compiled", line, flush=True)


# -----------------------------------------------------------------------------------------------------------------------------
# What the host prepares for a batch.


def make_tiles(query_offsets, key_offsets, shape, blocks, order="sequences"):
    """starts and tiles, lists of integers.

    Tiles go, in an order in which those that run at a time read the same keys and the largest sequences come first, each to the block of
    threads that has the least to do; a tile costs its blocks of keys and a constant. `sorted` orders by work alone, `strided` deals them
    out.
    """
    step, tiles = shape.tile_queries, []
    sequences = []
    for s in range(len(query_offsets) - 1):
        first, queries = query_offsets[s], query_offsets[s + 1] - query_offsets[s]
        first_key, keys = key_offsets[s], key_offsets[s + 1] - key_offsets[s]
        assert keys >= queries
        if queries:
            sequences.append((keys, first, queries, first_key))
    for keys, first, queries, first_key in sorted(sequences, reverse=True):
        for head in range(shape.kv_heads):
            for at in reversed(range(0, queries, step)):
                count = min(step, queries - at)
                seen = at + (keys - queries) + 1
                most = seen + count - 1
                used = -(-most // TILE_KEYS)
                own = min(TILE_KEYS, keys - (used - 1) * TILE_KEYS)
                # Of a short last block half is multiplied; in tenths of a block.
                tiles.append((-(-most // (TILE_KEYS // 2)) * 5 + 4, (first + at, first_key, seen, count | head << 8 | own << 16)))
    if order == "sorted":
        tiles.sort(key=lambda tile: -tile[0])
    lists = [[] for _ in range(blocks)]
    if order == "strided":
        for i, (_, tile) in enumerate(tiles):
            lists[i % blocks].append(tile)
    else:
        loads = [(0, block) for block in range(blocks)]
        for cost, tile in tiles:
            load, block = loads[0]
            lists[block].append(tile)
            heapq.heapreplace(loads, (load + cost, block))
    starts, flat = [0], []
    for part in lists:
        flat += [number for tile in part for number in tile]
        starts.append(len(flat) // 4)
    return starts, flat


class Kernel:
    def __init__(self, torch, folder, shape):
        self.torch, self.shape = torch, shape
        torch.zeros(1, device=DEVICE)
        self.driver = ctypes.CDLL("libcuda.so.1")
        with open(os.path.join(folder, shape.file), "rb") as file:
            image = file.read()
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self.checked(self.driver.cuModuleLoadData(ctypes.byref(self.module), image), "load")
        self.checked(self.driver.cuModuleGetFunction(ctypes.byref(self.function), self.module, b"attend"), "function")
        # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.checked(self.driver.cuFuncSetAttribute(self.function, 8, shape.shared), "shared memory")
        self.blocks = torch.cuda.get_device_properties(0).multi_processor_count

    def checked(self, status, what):
        if status != 0:
            raise RuntimeError(f"the CUDA driver answers {status} to {what}")

    def map_of(self, tensor, sizes, strides, box):
        """A tensor map of bfloat16: 128-byte swizzle, 256-byte promotion in L2, zero outside."""
        room = ctypes.create_string_buffer(192)
        room.at = -(-ctypes.addressof(room) // 64) * 64
        rank = len(sizes)
        self.checked(self.driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(room.at), 9, rank, ctypes.c_void_p(tensor.data_ptr()), (ctypes.c_uint64 * rank)(*sizes),
            (ctypes.c_uint64 * (rank - 1))(*strides), (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
            0, 3, 3, 0), f"a map of {sizes}, {strides}, {box}")
        return room

    def prepare(self, qkv, keys_values, query_offsets, key_offsets, out, order="sequences", blocks=None):
        """All that does not change between launches; returns a launch."""
        torch, s = self.torch, self.shape
        blocks = blocks or self.blocks
        starts, tiles = make_tiles(query_offsets, key_offsets, s, blocks, order)
        heads, row_bytes = s.heads + 2 * s.kv_heads, HEAD_DIM * 2
        queries_map = self.map_of(qkv, [HEAD_DIM, s.heads, qkv.shape[0]], [row_bytes, heads * row_bytes], [64, s.group, s.tile_queries])
        keys_map = self.map_of(keys_values, [HEAD_DIM, 2 * s.kv_heads, keys_values.shape[0]], [row_bytes, 2 * s.kv_heads * row_bytes],
                               [64, 1, TILE_KEYS])
        held = [torch.tensor(numbers, device=DEVICE, dtype=torch.int32) for numbers in (starts, tiles)] + [out, qkv, keys_values]
        places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in held[:3]]
        pointers = (ctypes.c_void_p * 5)(queries_map.at, keys_map.at, *(ctypes.addressof(place) for place in places))

        def launch(hold=(held, places, queries_map, keys_map)):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            self.checked(self.driver.cuLaunchKernel(self.function, blocks, 1, 1, s.threads, 1, 1, s.shared, stream, pointers, None),
                         "launch")

        # What the tensor cores are given, masked and empty parts included.
        halves = TILE_KEYS // 2
        rounded = lambda most: -(-most // halves) * halves
        launch.flop = sum(4 * s.tile_rows * HEAD_DIM * rounded(seen + (what & 0xFF) - 1) for seen, what in zip(tiles[2::4], tiles[3::4]))
        return launch


def finishes(torch, what, seconds=6.0):
    """Waits for the GPU; leaves if it does not come back."""
    mark = torch.cuda.Event()
    mark.record()
    limit = time.monotonic() + seconds
    while not mark.query():
        if time.monotonic() > limit:
            print(f"HUNG {what}", flush=True)
            os._exit(3)
        time.sleep(0.0005)


def flash(torch, qkv, keys_values, query_offsets, key_offsets, heads):
    most = lambda ends: max(b - a for a, b in zip(ends, ends[1:]))
    ends = [torch.tensor(offsets, device=DEVICE, dtype=torch.int32) for offsets in (query_offsets, key_offsets)]
    longest = (most(query_offsets), most(key_offsets))
    return lambda: torch.ops.aten._flash_attention_forward(
        qkv[:, :heads], keys_values[:, 0], keys_values[:, 1], *ends, *longest, 0.0, True, False, scale=HEAD_DIM**-0.5)[0]


def reference(torch, qkv, keys_values, query_offsets, key_offsets, s):
    """float32, a sequence and a group of heads at a time; rows outside all sequences are zero."""
    out = torch.zeros(qkv.shape[0], s.heads, HEAD_DIM, device=DEVICE)
    for a, b, c, d in zip(query_offsets, query_offsets[1:], key_offsets, key_offsets[1:]):
        hidden = torch.arange(d - c, device=DEVICE)[None] > torch.arange(b - a, device=DEVICE)[:, None] + (d - c) - (b - a)
        for head in range(s.kv_heads):
            part = slice(head * s.group, (head + 1) * s.group)
            scores = torch.einsum("qhd,kd->hqk", qkv[a:b, part].float(), keys_values[c:d, 0, head].float()) * HEAD_DIM**-0.5
            weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
            out[a:b, part] = torch.einsum("hqk,kd->qhd", weights, keys_values[c:d, 1, head].float())
    return out


def ends_of(lengths, first=0):
    ends = [first]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends


def batch(torch, shape, pairs, first=0, behind=0, scale=1.0, seed=1):
    """pairs: queries and keys of each sequence; first, behind: rows before and behind all sequences."""
    query_offsets, key_offsets = ends_of([q for q, _ in pairs], first), ends_of([k for _, k in pairs], first)
    random = torch.Generator(device=DEVICE).manual_seed(seed)
    make = lambda *size: torch.randn(*size, device=DEVICE, generator=random).to(torch.bfloat16)
    qkv = make(query_offsets[-1] + behind, shape.heads + 2 * shape.kv_heads, HEAD_DIM)
    qkv[:, : shape.heads] *= scale
    keys_values = make(key_offsets[-1] + behind, 2, shape.kv_heads, HEAD_DIM)
    return qkv, keys_values, query_offsets, key_offsets


POISON = 0x4B7B


def poisoned(torch, rows, shape):
    return torch.full((rows, shape.heads * HEAD_DIM), POISON, device=DEVICE, dtype=torch.int16).view(torch.bfloat16)


def apart(ours, expected):
    return ((ours.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


# -----------------------------------------------------------------------------------------------------------------------------


def probes(torch, folder, shape):
    """Inputs that show where an index goes wrong."""
    kernel = Kernel(torch, folder, shape)
    good = True
    for rows in [tuple(int(x) for x in pair) for pair in [(1, 1), (18, 18), (100, 128), (200, 300)]]:
        queries, keys = rows
        where = f"{shape.heads}/{shape.kv_heads} {shape.variant} {queries} over {keys}"
        qkv = torch.zeros(queries, shape.heads + 2 * shape.kv_heads, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
        kv = torch.zeros(keys, 2, shape.kv_heads, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
        column = torch.arange(HEAD_DIM, device=DEVICE).float()
        seen = torch.arange(queries, device=DEVICE).float() + keys - queries + 1
        number = torch.arange(keys, device=DEVICE)

        def attempt(name, expected, tolerance=0.01):
            out = poisoned(torch, queries, shape)
            kernel.prepare(qkv, kv, [0, queries], [0, keys], out)()
            finishes(torch, f"{where}: {name}")
            out = out.view(queries, shape.heads, HEAD_DIM).float()
            error = ((out - expected).abs() / expected.abs().clamp_min(1.0)).nan_to_num(9e9)
            if error.max().item() <= tolerance:
                return True
            wrong = (error > tolerance).nonzero()
            print(f"PROBE {where}: {name}: {len(wrong)} of {error.numel()} are wrong, the largest by {error.max().item():.3g}; "
                  f"first [row, head, column] {wrong[0].tolist()}, last {wrong[-1].tolist()}; "
                  f"wrong rows {wrong[:, 0].unique().tolist()[:24]}, heads {wrong[:, 1].unique().tolist()}, "
                  f"columns {wrong[:, 2].unique().tolist()[:40]}", flush=True)
            row, head = wrong[0, 0].item(), wrong[0, 1].item()
            print(f"   got      {[round(x, 2) for x in out[row, head].tolist()]}\n   expected "
                  f"{[round(x, 2) for x in expected.expand_as(out)[row, head].tolist()]}", flush=True)
            return False

        # Queries zero: all weights the same. Values by column alone, then by key alone, then by head alone.
        kv[:, 1] = column.to(torch.bfloat16)
        good &= attempt("values are their columns", column.expand(queries, shape.heads, HEAD_DIM))
        kv[:, 1] = (number % 128).to(torch.bfloat16)[:, None, None]
        mean = (number % 128).float().cumsum(0)[seen.long() - 1] / seen
        good &= attempt("values are their keys' numbers, alike weighed", mean[:, None, None])
        kv[:, 1] = (torch.arange(shape.kv_heads, device=DEVICE) + 1).to(torch.bfloat16)[:, None]
        by_head = (torch.arange(shape.heads, device=DEVICE) // shape.group + 1).float()
        good &= attempt("values are their heads' numbers", by_head[None, :, None])
        # A query finds the key that has its number: of columns in turn, the key's is one.
        kv[:, 0] = torch.eye(HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)[number % HEAD_DIM][:, None] * 16
        kv[:, 1] = (number % 128).to(torch.bfloat16)[:, None, None]
        wanted = torch.arange(queries, device=DEVICE) % min(HEAD_DIM, keys - queries + 1)
        qkv[:, : shape.heads] = torch.eye(HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)[wanted][:, None] * 16
        good &= attempt("each query finds a key", wanted.float()[:, None, None])
        # The same, another key for each head.
        several = (wanted[:, None] + 3 * torch.arange(shape.heads, device=DEVICE)[None]) % min(HEAD_DIM, keys - queries + 1)
        qkv[:, : shape.heads] = torch.eye(HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)[several] * 16
        good &= attempt("each query and head finds a key", several.float()[:, :, None])
        if not good:
            break
    print(f"probes {shape.heads}/{shape.kv_heads} {shape.variant}: {'good' if good else 'FAILED'}", flush=True)
    return good


def check(torch, folder, shape):
    kernel = Kernel(torch, folder, shape)
    lengths, further = [1, 63, 64, 65, 127, 128, 129, 200, 1000], [0, 1, 130, 200, 500]
    all_pairs = [(n, n + more) for more in further for n in lengths]
    cases = {
        "one query": dict(pairs=[(1, 1)]),
        "lengths, to the end of the buffer": dict(pairs=[(n, n) for n in lengths]),
        "lengths after prefixes, rows around": dict(pairs=all_pairs, first=37, behind=53),
        "short ones last": dict(pairs=all_pairs[::-1], first=1),
        "sharp": dict(pairs=all_pairs[::2], scale=6.0),
        "long": dict(pairs=[(3001, 3201), (700, 2900)], behind=1),
        "many short": dict(pairs=[(1 + i * 7 % 60, 1 + i * 7 % 60 + i % 5) for i in range(300)]),
    }
    good = True
    for name, case in cases.items():
        where = f"{shape.heads}/{shape.kv_heads} {shape.variant}, {name}"
        qkv, kv, queries, keys = batch(torch, shape, **case)
        rows = qkv.shape[0]
        out = poisoned(torch, rows, shape)
        kernel.prepare(qkv, kv, queries, keys, out)()
        finishes(torch, where)
        expected = reference(torch, qkv, kv, queries, keys, shape)
        theirs = torch.zeros_like(out).view(rows, shape.heads, HEAD_DIM)
        theirs[queries[0] : queries[-1]] = flash(torch, qkv[queries[0] : queries[-1]], kv[keys[0] :], [q - queries[0] for q in queries],
                                                 [k - keys[0] for k in keys], shape.heads)()[: queries[-1] - queries[0]]
        inside = slice(queries[0], queries[-1])
        ours = out.view(rows, shape.heads, HEAD_DIM)
        own, other = apart(ours[inside], expected[inside]), apart(theirs[inside], expected[inside])
        outside = out.view(torch.int16)
        untouched = bool((outside[: queries[0]] == POISON).all() and (outside[queries[-1] :] == POISON).all())
        worst, at = 0.0, None
        for i, (a, b) in enumerate(zip(queries, queries[1:])):
            ratio = apart(ours[a:b], expected[a:b]) / max(apart(theirs[a:b], expected[a:b]), 5e-4)
            if not ratio <= worst:
                worst, at = ratio, (b - a, keys[i + 1] - keys[i])
        fine = own <= 1.05 * other + 1e-6 and untouched and worst < 1.5
        good &= fine
        print(f"check {where}: error {own:.3e}, flash {other:.3e}, worst of a sequence {worst:.3f} × flash at {at}"
              f"{'' if untouched else ', OUTSIDE TOUCHED'}{'' if fine else '  FAILED'}", flush=True)
        if not fine:
            bad = ((ours[inside].float() - expected[inside]).abs().nan_to_num(9e9) > 0.05).nonzero()
            if len(bad):
                print(f"   {len(bad)} wrong, first {bad[0].tolist()}, last {bad[-1].tolist()}, rows {bad[:, 0].unique().tolist()[:30]}, "
                      f"heads {bad[:, 1].unique().tolist()}, columns {bad[:, 2].unique().tolist()[:40]}", flush=True)
        # Another distribution of the work, another buffer: the same bits. Again, the same bits.
        for order, blocks in [("strided", kernel.blocks), ("sorted", 3), ("sequences", kernel.blocks)]:
            again = poisoned(torch, rows, shape)
            kernel.prepare(qkv, kv, queries, keys, again, order, blocks)()
            finishes(torch, f"{where}, {order} {blocks}")
            if not torch.equal(again.view(torch.int16), out.view(torch.int16)):
                good = False
                print(f"check {where}: other bits with {order} on {blocks}  FAILED", flush=True)
        # What is not finite stays in its sequence.
        if len(queries) > 2:
            spoiled = kv.clone()
            for i in range(1, len(keys) - 1, 3):
                spoiled[keys[i] : keys[i + 1], :] = float("nan") if i % 2 else float("inf")
            if rows > queries[-1]:
                spoiled[keys[-1] :] = float("nan")
            again = poisoned(torch, rows, shape)
            kernel.prepare(qkv, spoiled, queries, keys, again)()
            finishes(torch, f"{where}, not finite")
            leaks = [i for i in range(len(keys) - 1) if i % 3 != 1
                     and not torch.equal(again[queries[i] : queries[i + 1]].view(torch.int16), out[queries[i] : queries[i + 1]].view(torch.int16))]
            if leaks:
                good = False
                print(f"check {where}: what is not finite reaches sequences {leaks[:20]}  FAILED", flush=True)
        del expected, theirs, qkv, kv, out, again
    print(f"check {shape.heads}/{shape.kv_heads} {shape.variant}: {'good' if good else 'FAILED'}", flush=True)
    return good


def measure(torch, folder, heads, kv_heads, variants, out_folder):
    def of_groups(count):
        pairs = []
        for prompt, *completions in lengths(torch, count):
            pairs += [(prompt, prompt), *((own, prompt + own) for own in completions)]
        return pairs

    document = dict(card=torch.cuda.get_device_name(), heads=heads, kv_heads=kv_heads, batches={})
    shape = Shape(heads, kv_heads, variants[0])
    kernels = {variant: Kernel(torch, folder, Shape(heads, kv_heads, variant)) for variant in variants}
    for name, pairs in {"two groups": of_groups(2), "four groups": of_groups(4), "16 x 800 over 1000": [(800, 1000)] * 16}.items():
        qkv, kv, queries, keys = batch(torch, shape, pairs)
        visible = sum(q * (k - q) + q * (q + 1) / 2 for q, k in pairs)
        flop = 4 * heads * HEAD_DIM * visible
        theirs = flash(torch, qkv, kv, queries, keys, heads)
        expected = theirs().view(qkv.shape[0], -1)
        torch.cuda.synchronize()
        works, errors = {"flash": theirs}, {"flash": 0.0}
        plans = [(variant, "sequences") for variant in variants]
        plans += [(variants[0], "sorted"), (variants[0], "strided")]
        for variant, order in plans:
            label = variant if order == "sequences" else f"{variant}, {order}"
            print(f"TRY {variant}", flush=True)
            out = poisoned(torch, qkv.shape[0], shape)
            launch = kernels[variant].prepare(qkv, kv, queries, keys, out, order)
            launch()
            finishes(torch, f"time {heads}/{kv_heads} {variant}")
            works[label], errors[label] = launch, apart(out, expected)
        times = {label: [] for label in works}
        for round_ in range(14):
            for label, work in works.items():
                before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                before.record()
                work()
                after.record()
                if round_ >= 2:
                    times[label].append((before, after))
            finishes(torch, f"time {heads}/{kv_heads} round {round_}", 8)
        print(f"time {heads}/{kv_heads}, {name}: {qkv.shape[0]} rows, {flop / 1e12:.3f} TFLOP", flush=True)
        results = {}
        for label, marks in times.items():
            taken = [before.elapsed_time(after) for before, after in marks]
            ms = statistics.median(taken)
            results[label] = dict(ms=ms, least=min(taken), most=max(taken), tflops=flop / ms / 1e9, error=errors[label])
            print(f"   {label:24} {ms:8.3f} ms ({min(taken):.3f} to {max(taken):.3f})  {flop / ms / 1e9:6.0f} TFLOP/s  "
                  f"{results['flash']['ms'] / ms:5.2f} × flash   {getattr(works[label], 'flop', 0) / ms / 1e9:5.0f} given   apart from flash {errors[label]:.1e}", flush=True)
        document["batches"][name] = results
        with open(os.path.join(out_folder, f"attn-{heads}-{kv_heads}.json"), "w") as file:
            json.dump(document, file, indent=1)
        del qkv, kv, expected, works, theirs


def part(arguments):
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    heads, kv_heads = map(int, arguments.heads.split("/"))
    names = arguments.variants.split(",")
    if arguments.part == "check":
        shape = Shape(heads, kv_heads, names[0])
        good = probes(torch, arguments.folder, shape)
        good = check(torch, arguments.folder, shape) and good
        sys.exit(0 if good else 1)
    measure(torch, arguments.folder, heads, kv_heads, names, arguments.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=88, help="for all")
    parser.add_argument("--out", default=os.environ.get("OUT", "."), help="folder for the results")
    parser.add_argument("--part"), parser.add_argument("--heads"), parser.add_argument("--variants"), parser.add_argument("--folder")
    arguments = parser.parse_args()
    if arguments.part:
        return part(arguments)
    began = time.monotonic()
    left = lambda: arguments.seconds - (time.monotonic() - began)
    say = lambda text: print(f"[{time.monotonic() - began:5.1f} s] {text}", flush=True)
    folder = tempfile.mkdtemp()
    outcomes = []

    def begin(what, heads, variants):
        command = [sys.executable, "-u", os.path.abspath(__file__), "--part", what, "--heads", f"{heads[0]}/{heads[1]}", "--variants",
                   ",".join(variants), "--folder", folder, "--out", arguments.out]
        file = open(os.path.join(folder, f"{what}-{heads[0]}-{'-'.join(variants)}.log"), "w+")
        return dict(name=f"{what} {heads[0]}/{heads[1]} {','.join(variants)}", file=file, began=time.monotonic(),
                    process=subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))

    def end(run):
        """Prints what it said; returns its status and its words."""
        try:
            status = run["process"].wait(max(0.5, min(40 - (time.monotonic() - run["began"]), left())))
        except subprocess.TimeoutExpired:
            run["process"].kill()
            run["process"].wait()
            status = "out of time"
        run["file"].seek(0)
        words = run["file"].read()
        say(f"{run['name']}: {'done' if status == 0 else f'FAILED ({status})'}")
        print(words, flush=True)
        outcomes.append(f"{run['name']}: {status}")
        return status, words

    compile_all(folder)
    say("compiled")
    # Checks of all heads at a time: none of them is timed.
    wrong = [end(run)[0] != 0 for run in [begin("check", heads, ["default"]) for heads in HEADS]]
    if any(wrong):
        sys.exit("\n".join([*outcomes, "wrong: not timed"]))
    for heads in HEADS:
        variants = list(VARIANTS)
        while variants and left() > 8:
            status, words = end(begin("time", heads, variants))
            tried = [line.split()[1] for line in words.splitlines() if line.startswith("TRY ")]
            if status == 0 or not tried or tried[-1] not in variants:
                break
            # The one at work when it broke.
            variants.remove(tried[-1])
    print("\n".join(outcomes))
    say("the end")


if __name__ == "__main__":
    main()
