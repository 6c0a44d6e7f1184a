"""The worker's own kernels by themselves, without the worker.

    python3 deploy/gpu/own_kernels.py check [--architectures 80,90,100] [--json FILE]
    python3 deploy/gpu/own_kernels.py time [--shapes qwen2-7b,qwen2-1.5b] [--json FILE]

`check` compiles them with NVRTC as the worker does, for all shapes of shared/model/cuda/options.txt, and prints what each kernel
takes: registers, shared memory, spills. attend.cu and gate_up_silu.cu, which are for Hopper alone, are compiled for sm_90a where sm_90
is asked for; their shared memory is asked for at the launch. It needs no GPU; deploy/gpu/check-kernels.sh fetches NVRTC for it. A
warning of the compiler and a spill are failures.

`time` runs them on a GPU over two groups of usual length, compares each result with torch's own operations, and prints what share of
the card's copying speed each reaches; beside them attention and the matrix products of a layer, which are torch's. FILE is written
anew behind each shape.
"""

import argparse
import ctypes
import glob
import itertools
import json
import os
import re
import site
import statistics
import sys

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../shared/model/cuda")
REGISTERS_OF_A_MULTIPROCESSOR = 65536


def shapes():
    with open(os.path.join(FOLDER, "options.txt")) as file:
        return {line.split()[0]: line.split()[1:] for line in file if line.strip()}


class Compiler:
    """NVRTC of the wheel nvidia-cuda-nvrtc, which torch's wheel needs too."""

    def __init__(self):
        folders = [os.path.join(root, "nvidia/cu13/lib") for root in [*site.getsitepackages(), site.getusersitepackages(), *sys.path]]
        folder = next((folder for folder in folders if glob.glob(folder + "/libnvrtc.so.13")), "")
        for builtins in glob.glob(folder + "/libnvrtc-builtins.so.13.*"):
            # It is asked for by name, and found if it is there already.
            if ".alt." not in builtins:
                ctypes.CDLL(builtins)
        try:
            self.library = ctypes.CDLL(os.path.join(folder, "libnvrtc.so.13"))
        except OSError as error:
            sys.exit(f"no NVRTC ({error}): run deploy/gpu/check-kernels.sh, or install nvidia-cuda-nvrtc")
        self.sources = {}
        for name in ("kernels.cu", "weights.cu", ATTEND, GATE_UP_SILU):
            with open(os.path.join(FOLDER, name), "rb") as file:
                self.sources[name] = file.read()

    def text(self, program, what):
        size = ctypes.c_size_t()
        getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    def compile(self, architecture, macros, more=(), source="kernels.cu"):
        """Image and log; the options are the worker's, and then `more`."""
        options = [f"--gpu-architecture=sm_{architecture}", *(f"-D{macro}" for macro in macros), *more]
        program = ctypes.c_void_p()
        if self.library.nvrtcCreateProgram(ctypes.byref(program), self.sources[source], source.encode(), 0, None, None) != 0:
            sys.exit("NVRTC refuses the source")
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        code = self.library.nvrtcCompileProgram(program, len(options), words)
        log = self.text(program, "ProgramLog").rstrip(b"\0").decode()
        image = self.text(program, "CUBIN") if code == 0 else b""
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        if code != 0:
            sys.exit(f"sm_{architecture} {' '.join(macros)}: {log}")
        return image, log


def resources(log):
    """By kernel: registers, bytes of shared memory, bytes that are spilled."""
    found, name, spilled = {}, "", 0
    for line in log.splitlines():
        if entry := re.search(r"entry function '(\w+)'", line):
            name = entry[1]
        if spill := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = sum(map(int, spill.groups()))
        if used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = dict(registers=int(used[1]), shared=int(shared[1]) if shared else 0, spilled=spilled)
    return found


def check(arguments):
    compiler, failures, document = Compiler(), [], []
    print("architecture, shape, and for each kernel its registers + bytes of shared memory")
    sources = [("kernels.cu", shape, macros) for shape, macros in shapes().items()] + [("weights.cu", "any", [])]
    runs = list(itertools.product(arguments.architectures.split(","), sources))
    if "90" in arguments.architectures.split(","):
        runs += [("90a", (ATTEND, shape, macros)) for shape, macros in attend_shapes().items()]
        gate_up = {shape: gate_up_macros(Threads(macros)) for shape, macros in shapes().items()}
        runs += [("90a", (GATE_UP_SILU, shape, macros)) for shape, macros in gate_up.items() if macros]
    for architecture, (source, shape, macros) in runs:
        # Of those for Hopper threads have other registers than those reported: they deal them out themselves.
        names, threads = {
            "kernels.cu": lambda: (KERNELS, Threads(macros).of),
            "weights.cu": lambda: (WEIGHT_KERNELS, dict.fromkeys(WEIGHT_KERNELS, 256)),
            ATTEND: lambda: (["attend"], dict(attend=384)),
            GATE_UP_SILU: lambda: (["gate_up_silu"], dict(gate_up_silu=384)),
        }[source]()
        image, log = compiler.compile(architecture, macros, source=source)
        _, report = compiler.compile(architecture, macros, ["--ptxas-options=-v"], source)
        found = resources(report)
        document.append(dict(architecture=architecture, shape=shape, bytes=len(image), kernels=found))
        place = f"sm_{architecture} {source} {shape}"
        if log.strip():
            failures.append(f"{place}: the compiler says {log.strip()}")
        failures += [f"{place}: {name} is missing" for name in names if name not in found]
        failures += [f"{place}: {name} spills {kernel['spilled']} bytes" for name, kernel in found.items() if kernel["spilled"]]
        for name, kernel in found.items():
            if kernel["registers"] * threads[name] > REGISTERS_OF_A_MULTIPROCESSOR:
                failures.append(f"{place}: a block of {name} needs more registers than there are")
        cells = (f"{name} {kernel['registers']} + {kernel['shared']}" for name, kernel in found.items())
        print(f"| {architecture} | {shape} | " + " | ".join(cells) + " |", flush=True)
    write(arguments.json, document)
    for failure in failures:
        print(failure)
    print("FAILED" if failures else "all as it should be")
    return not failures


def attend_shapes():
    """By shape, where heads are of 128: what the worker compiles attend.cu with."""
    wanted = ("HEADS=", "KV_HEADS=", "HEAD_DIM=")
    return {shape: [macro for macro in macros if macro.startswith(wanted)] for shape, macros in shapes().items() if "HEAD_DIM=128" in macros}


def gate_up_macros(size):
    """What the worker compiles gate_up_silu.cu with, if its tiles divide the sizes."""
    fits = size.hidden % 64 == 0 and size.hidden >= 576 and size.inner % 128 == 0
    return [f"HIDDEN={size.hidden}", f"INNER={size.inner}"] if fits else None


ATTEND = "attend.cu"
GATE_UP_SILU = "gate_up_silu.cu"
WEIGHT_KERNELS = ["sum_elements", "sum_differences", "copy_elements", "read_elements", "write_elements", "compare_elements"]
KERNELS = ["residual_norm", "rotate_queries", "gather_keys", "silu_up", "choose", "select_buckets"]


class Threads:
    """Threads of a block, as the worker launches them."""

    def __init__(self, macros):
        size = dict(macro.split("=") for macro in macros)
        self.hidden, self.heads, self.kv_heads, self.head_dim, self.inner, self.vocab = (
            int(size[name]) for name in ["HIDDEN", "HEADS", "KV_HEADS", "HEAD_DIM", "INNER", "VOCAB"]
        )
        self.epsilon, self.head_norm = float(size["EPSILON"].rstrip("f")), size["HEAD_NORM"] == "1"
        up = lambda value, to: -(-value // to)
        self.select_rows = min(4, 49152 // (self.hidden * 2 + 64))
        self.silu_lines = up(self.inner // 8, 256)
        self.of = dict(
            residual_norm=min(1024, up(up(self.hidden // 8, 2), 32) * 32), rotate_queries=min(self.heads, 4) * 32,
            gather_keys=self.kv_heads * 32, silu_up=256, choose=512, select_buckets=self.select_rows * 32,
        )


def write(path, document):
    if path:
        with open(path, "w") as file:
            json.dump(document, file, indent=1)


# -----------------------------------------------------------------------------------------------------------------------------


class Card:
    """Kernels of one shape, loaded on the current GPU."""

    def __init__(self, torch, macros):
        major, minor = torch.cuda.get_device_capability()
        self.torch, self.shape = torch, Threads(macros)
        torch.zeros(1, device="cuda")
        self.driver, self.functions, self.shared = ctypes.CDLL("libcuda.so.1"), {}, {}
        compiler = Compiler()
        self.load(compiler.compile(f"{major}{minor}", macros)[0], KERNELS)
        own = gate_up_macros(self.shape)
        self.has_gate_up_silu = (major, minor) == (9, 0) and own is not None
        if self.has_gate_up_silu:
            self.load(compiler.compile("90a", own, source=GATE_UP_SILU)[0], ["gate_up_silu"])
            # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.shared["gate_up_silu"], self.shape.of["gate_up_silu"] = 229440, 384
            self.checked(self.driver.cuFuncSetAttribute(self.functions["gate_up_silu"], 8, self.shared["gate_up_silu"]))

    def load(self, image, names):
        module = ctypes.c_void_p()
        self.checked(self.driver.cuModuleLoadData(ctypes.byref(module), image))
        for name in names:
            self.functions[name] = ctypes.c_void_p()
            self.checked(self.driver.cuModuleGetFunction(ctypes.byref(self.functions[name]), module, name.encode()))

    def map_of(self, matrix, columns, rows):
        """A tensor map of a bfloat16 matrix with boxes of so many columns and rows, as the worker makes them."""
        room = ctypes.create_string_buffer(192)
        room.at = -(-ctypes.addressof(room) // 64) * 64
        self.checked(self.driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(room.at), 9, 2, ctypes.c_void_p(matrix.data_ptr()), (ctypes.c_uint64 * 2)(*reversed(matrix.shape)),
            (ctypes.c_uint64 * 1)(matrix.shape[1] * 2), (ctypes.c_uint32 * 2)(columns, rows), (ctypes.c_uint32 * 2)(1, 1), 0, 3, 3, 0))
        return room

    def checked(self, status):
        if status != 0:
            sys.exit(f"the CUDA driver answers {status}")

    def launch(self, name, columns, *arguments, lines=1):
        """Arguments are tensors, None, integers and tensor maps."""
        places = [
            ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_void_p(0 if argument is None else argument.data_ptr())
            for argument in arguments if not hasattr(argument, "at")
        ]
        left = iter(places)
        addresses = [argument.at if hasattr(argument, "at") else ctypes.addressof(next(left)) for argument in arguments]
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        threads = self.shape.of[name]
        self.checked(self.driver.cuLaunchKernel(
            self.functions[name], columns, lines, 1, threads, 1, 1, self.shared.get(name, 0), stream, pointers, None))


def milliseconds(torch, work, repeats=20):
    """Median time of `work` on the GPU."""
    for _ in range(3):
        work()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in marks:
        before.record()
        work()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in marks)


def lengths(torch, groups=2, prompt=200, mean=800):
    random = torch.Generator().manual_seed(4)
    drawn = torch.randn(groups, 16, generator=random) * 0.5 + torch.tensor(float(mean)).log() - 0.125
    return [[prompt, *(int(length) for length in row.exp().clamp(4, 8192))] for row in drawn]


def measure(torch, shape, macros, groups, copy_rate):
    """Rows of a table: name, milliseconds, rate, its unit, share of the ceiling, largest relative error."""
    card = Card(torch, macros)
    s, bf16 = card.shape, dict(device="cuda", dtype=torch.bfloat16)
    rows = sum(map(sum, groups))
    random = lambda *size: torch.randn(*size, device="cuda").to(torch.bfloat16)
    results = []

    def note(name, work, bytes_moved=None, flop=None, ours=None, expected=None):
        time = milliseconds(torch, work)
        entry = dict(name=name, milliseconds=time)
        if bytes_moved:
            rate = bytes_moved / time / 1e6
            entry.update(rate=rate, unit="GB/s", share=rate / copy_rate)
        else:
            entry.update(rate=flop / time / 1e9, unit="TFLOP/s")
        if ours is not None:
            apart = (ours.double() - expected.double()).norm() / expected.double().norm()
            entry.update(error=apart.item())
        results.append(entry)
        error = f"{entry['error']:.1e}" if "error" in entry else ""
        share = f"{entry['share'] * 100:.0f} %" if "share" in entry else ""
        print(f"| {shape}, {name} | {time:.3f} | {entry['rate']:.0f} {entry['unit']} | {share} | {error} |", flush=True)

    x, addend, weight = random(rows, s.hidden), random(rows, s.hidden), random(s.hidden)
    out, total = torch.empty(rows, s.hidden, **bf16), x + addend
    held = x.clone()
    card.launch("residual_norm", rows, held, addend, weight, out)
    wide = total.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + s.epsilon)).to(torch.bfloat16)
    own = out.clone()
    assert torch.equal(held, total), "residual"
    zero = torch.zeros_like(addend)
    note("residual and norm", lambda: card.launch("residual_norm", rows, held, zero, weight, out), 8 * rows * s.hidden,
         ours=own, expected=expected)
    del wide, expected, own, zero, addend, total

    buckets = torch.empty(rows, 16, device="cuda", dtype=torch.int8)
    blocks = -(-rows // s.select_rows)
    note("buckets", lambda: card.launch("select_buckets", blocks, held, buckets, rows), 2 * rows * s.hidden)
    del x, held, out

    heads = s.heads + 2 * s.kv_heads
    qkv = random(rows, heads, s.head_dim)
    angles = torch.rand(rows, s.head_dim // 2, device="cuda") * 6
    cos, sin = (torch.cat([wave, wave], -1).to(torch.bfloat16) for wave in (angles.cos(), angles.sin()))
    norm = random(s.head_dim) if s.head_norm else None

    def rotated(part):
        if s.head_norm:
            wide = part.float()
            part = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + s.epsilon)).to(torch.bfloat16)
        first, second = part.chunk(2, -1)
        return part * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    expected = rotated(qkv[:, : s.heads])
    expected_keys = rotated(qkv[:, s.heads : s.heads + s.kv_heads])
    mine = qkv.clone()
    card.launch("rotate_queries", rows, mine, cos, sin, norm)
    own = mine[:, : s.heads].clone()
    note("rotation of queries", lambda: card.launch("rotate_queries", rows, mine, cos, sin, norm),
         4 * rows * s.heads * s.head_dim + 4 * rows * s.head_dim, ours=own, expected=expected)
    # The prompt's keys before each completion's own, as the worker lays them out.
    sources, query_ends, key_ends, first = [], [0], [0], 0
    for prompt, *completions in groups:
        prompt_rows = range(first, first + prompt)
        for place, length in enumerate([prompt, *completions]):
            own_rows = range(first, first + length)
            sources += [*prompt_rows, *own_rows] if place else own_rows
            first += length
            query_ends.append(first)
            key_ends.append(len(sources))
    longest_query = max(max(group) for group in groups)
    longest_key = max(max(group[0], group[0] + max(group[1:])) for group in groups)
    sources, query_ends, key_ends = (torch.tensor(numbers, device="cuda", dtype=torch.int32)
                                     for numbers in (sources, query_ends, key_ends))
    keys = torch.empty(len(sources), 2, s.kv_heads, s.head_dim, **bf16)
    note("keys and values", lambda: card.launch("gather_keys", len(sources), qkv, sources, cos, sin, norm, keys),
         8 * len(sources) * s.kv_heads * s.head_dim)
    same = (keys[:, 0].double() - expected_keys[sources.long()].double()).norm() / expected_keys.double().norm()
    assert same < 1e-2 and torch.equal(keys[:, 1], qkv[sources.long(), s.heads + s.kv_heads :]), "keys and values"

    pairs = sum(prompt * (prompt + 1) / 2 + sum(own * prompt + own * (own + 1) / 2 for own in completions)
                for prompt, *completions in groups)
    attend = lambda: torch.ops.aten._flash_attention_forward(
        mine[:, : s.heads], keys[:, 0], keys[:, 1], query_ends, key_ends, longest_query, longest_key, 0.0, True, False,
        scale=s.head_dim**-0.5)
    note("attention", attend, flop=4 * s.heads * s.head_dim * pairs)
    del mine, qkv, keys, expected, own, expected_keys

    gate_up, activated = random(rows, 2 * s.inner), torch.empty(rows, s.inner, **bf16)
    card.launch("silu_up", rows, gate_up, activated, lines=s.silu_lines)
    expected = torch.nn.functional.silu(gate_up[:, : s.inner]) * gate_up[:, s.inner :]
    own = activated.clone()
    note("silu and up", lambda: card.launch("silu_up", rows, gate_up, activated, lines=s.silu_lines), 6 * rows * s.inner,
         ours=own, expected=expected)
    del gate_up, expected, own
    if card.has_gate_up_silu:
        x, weight = random(rows, s.hidden), (torch.randn(2 * s.inner, s.hidden, device="cuda") * s.hidden**-0.5).to(torch.bfloat16)
        maps = [card.map_of(x, 64, 128), card.map_of(weight, 64, 128), card.map_of(activated, 64, 64)]
        blocks = torch.cuda.get_device_properties(0).multi_processor_count // 2 * 2
        gate_up = torch.mm(x, weight.t())
        card.launch("gate_up_silu", blocks, *maps, rows)
        flop = 4 * rows * s.hidden * s.inner
        both = torch.empty_like(activated)

        def product_and_activation():
            torch.mm(x, weight.t(), out=gate_up)
            card.launch("silu_up", rows, gate_up, both, lines=s.silu_lines)

        note("product gate|up, then silu and up", product_and_activation, flop=flop)
        note("both in one", lambda: card.launch("gate_up_silu", blocks, *maps, rows), flop=flop, ours=activated, expected=both)
        del x, weight, maps, gate_up, both
    del activated

    chunk = max(1, (3 << 27) // s.vocab // 256) * 256
    logits = random(chunk, s.vocab) * 3
    targets, no_token = (torch.randint(s.vocab, (chunk,), device="cuda", dtype=torch.int32),
                         torch.full((chunk,), -1, device="cuda", dtype=torch.int32))
    logprobs, likely = torch.empty(chunk, device="cuda"), torch.empty(chunk, device="cuda")
    card.launch("choose", chunk, logits, targets, no_token, logprobs, likely)
    expected = torch.cat([part.float().log_softmax(-1).gather(-1, chosen[:, None].long())[:, 0]
                          for part, chosen in zip(logits.split(256), targets.split(256))])
    own = logprobs.clone()
    note("log-softmax", lambda: card.launch("choose", chunk, logits, targets, no_token, logprobs, likely),
         2 * chunk * s.vocab, ours=own, expected=expected)
    del logits

    query = s.heads * s.head_dim
    for name, inputs, outputs, count, biased in [
        ("q|k|v", s.hidden, heads * s.head_dim, rows, not s.head_norm), ("output", query, s.hidden, rows, False),
        ("gate|up", s.hidden, 2 * s.inner, rows, False), ("down", s.inner, s.hidden, rows, False),
        ("head", s.hidden, s.vocab, chunk, False), ("8192³", 8192, 8192, 8192, False),
    ]:
        left, right, bias = random(count, inputs), random(outputs, inputs).t(), random(outputs)
        into = torch.empty(count, outputs, **bf16)
        product = (lambda: torch.addmm(bias, left, right, out=into)) if biased else (lambda: torch.mm(left, right, out=into))
        note(f"product {name}", product, flop=2 * count * inputs * outputs)
        del left, right, bias, into
    return results


def time(arguments):
    import torch

    card = torch.cuda.get_device_name()
    source, target = torch.empty(1 << 30, device="cuda", dtype=torch.uint8), torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    copy_rate = 2 * (1 << 30) / milliseconds(torch, lambda: target.copy_(source)) / 1e6
    del source, target
    groups = lengths(torch)
    document = dict(card=card, torch=torch.__version__, copy_gb_per_s=copy_rate, groups=groups, shapes={})
    print(f"{card}, torch {torch.__version__}; a copy moves {copy_rate:.0f} GB/s; {sum(map(sum, groups))} rows")
    print("| kernel | ms | rate | of copying | error |")
    print("|---|---|---|---|---|")
    good = True
    for shape in arguments.shapes.split(","):
        results = measure(torch, shape, shapes()[shape], groups, copy_rate)
        document["shapes"][shape] = results
        write(arguments.json, document)
        good = good and all(entry.get("error", 0.0) < 1e-2 for entry in results)
        torch.cuda.empty_cache()
    print("all as it should be" if good else "FAILED")
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--architectures", default="80,90,100")
    parser.add_argument("--shapes", default="qwen2-7b,qwen2-1.5b")
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    sys.exit(0 if {"check": check, "time": time}[arguments.what](arguments) else 1)


if __name__ == "__main__":
    main()
