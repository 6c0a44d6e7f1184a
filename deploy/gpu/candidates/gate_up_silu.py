"""Checks and times gate_up_silu.cu on a Hopper GPU; at most about 90 seconds.

    python3 deploy/gpu/candidates/gate_up_silu.py [--variants base,lead1,...] [--budget 90]

from the repository's root, with gate_up_silu.cu beside this file. Every shape runs in a process of its own, which is killed when it takes too
long; a variant that hangs or fails is named and left out of what follows.
"""

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, "deploy/gpu")
import own_kernels

HERE = os.path.dirname(os.path.abspath(__file__))
SHAPES = {"qwen2-7b": (3584, 18944), "qwen2-1.5b": (1536, 8960), "qwen3-4b": (2560, 9728)}
VARIANTS = {
    "base": {}, "half": dict(RELEASE_AFTER=2), "hold": dict(RELEASE_AFTER=4), "lead1": dict(LEAD=1), "hints": dict(HINTS=1),
    "group16": dict(GROUP=16), "group4": dict(GROUP=4), "direct": dict(DEFERRED=0), "direct_lead2": dict(DEFERRED=0, LEAD=2),
    "cluster1": dict(CLUSTER=1, GROUP=16),
}
ROWS_TO_CHECK = [1, 127, 300, 1000, 4097, 13024, 26047]
ROWS_TO_TIME = {"qwen2-7b": [26047, 13024], "qwen2-1.5b": [26047, 52000]}
SECONDS_OF_A_CHILD = 40
POISON = 0x7FA5  # a NaN that no arithmetic makes


def compile_one(task):
    folder, shape, variant = task
    hidden, inner = SHAPES[shape]
    try:
        compiler = own_kernels.Compiler()
    except SystemExit as error:  # It would end the pool's process, and the pool would wait for it.
        return shape, variant, f"FAILED: {error}"
    with open(os.path.join(HERE, "gate_up_silu.cu"), "rb") as file:
        source = file.read()
    macros = [f"HIDDEN={hidden}", f"INNER={inner}", *(f"{name}={value}" for name, value in VARIANTS[variant].items())]
    options = ["--gpu-architecture=sm_90a", *(f"-D{macro}" for macro in macros)]
    program = ctypes.c_void_p()
    if compiler.library.nvrtcCreateProgram(ctypes.byref(program), source, b"gate_up_silu.cu", 0, None, None) != 0:
        return shape, variant, "FAILED: NVRTC refuses the source"
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    code = compiler.library.nvrtcCompileProgram(program, len(options), words)
    log = compiler.text(program, "ProgramLog").rstrip(b"\0").decode().strip()
    if code != 0:
        return shape, variant, f"FAILED: {log}"
    with open(os.path.join(folder, f"{shape}-{variant}.cubin"), "wb") as file:
        file.write(compiler.text(program, "CUBIN"))
    return shape, variant, log


# -----------------------------------------------------------------------------------------------------------------------------
# In the child: the kernel.


def tensor_map(driver, tensor, box):
    """Of a contiguous bfloat16 matrix; box is (columns, rows)."""
    rows, columns = tensor.shape
    held = ctypes.create_string_buffer(128 + 64)
    at = -(-ctypes.addressof(held) // 64) * 64
    status = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), ctypes.c_int(9), ctypes.c_uint32(2), ctypes.c_void_p(tensor.data_ptr()),
        (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * 2), (ctypes.c_uint32 * 2)(*box),
        (ctypes.c_uint32 * 2)(1, 1), ctypes.c_int(0), ctypes.c_int(3), ctypes.c_int(2), ctypes.c_int(0))
    if status != 0:
        sys.exit(f"cuTensorMapEncodeTiled answers {status}")
    return held, at


class Fused:
    """One variant of gate_up_silu for one shape."""

    def __init__(self, torch, folder, shape, variant):
        self.torch, self.driver = torch, ctypes.CDLL("libcuda.so.1")
        with open(os.path.join(folder, f"{shape}-{variant}.cubin"), "rb") as file:
            self.image = file.read()
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self.checked(self.driver.cuModuleLoadData(ctypes.byref(module), self.image))
        self.checked(self.driver.cuModuleGetFunction(ctypes.byref(self.function), module, b"gate_up_silu"))
        size = VARIANTS[variant]
        cluster, stages = size.get("CLUSTER", 2), size.get("STAGES", 4)
        self.shared = stages * 49152 + 32768 + 2 * stages * 8
        self.checked(self.driver.cuFuncSetAttribute(self.function, 8, self.shared))
        self.grid = torch.cuda.get_device_properties(0).multi_processor_count // cluster * cluster
        self.maps = {}

    def checked(self, status):
        if status != 0:
            raise RuntimeError(f"the CUDA driver answers {status}")

    def prepare(self, x, weight, out):
        """out may have more rows than x: they are not the map's."""
        rows = x.shape[0]
        maps = [tensor_map(self.driver, x, (64, 128)), tensor_map(self.driver, weight, (64, 128)),
                tensor_map(self.driver, out[:rows], (64, 64))]
        number = ctypes.c_int(rows)
        pointers = (ctypes.c_void_p * 4)(*(at for _, at in maps), ctypes.addressof(number))

        def launch(held=(maps, number)):
            stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
            self.checked(self.driver.cuLaunchKernel(self.function, self.grid, 1, 1, 384, 1, 1, self.shared, stream, pointers, None))

        return launch


def watched(torch, what, seconds=6):
    """Until the GPU is done; ends the process when it is not."""
    mark = torch.cuda.Event()
    mark.record()
    until = time.time() + seconds
    while not mark.query():
        if time.time() > until:
            print(f"HANGS: {what}", flush=True)
            os._exit(3)
        time.sleep(0.0005)


def begin(torch):
    torch.manual_seed(7)
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_grad_enabled(False)


def rows_at_a_time(*tensors, step=4096):
    return zip(*(tensor.split(step) for tensor in tensors))


def reference(torch, x, weight, inner):
    out = torch.empty(x.shape[0], inner, device="cuda", dtype=torch.bfloat16)
    gate_up = torch.mm(x, weight.t())
    for to, part in rows_at_a_time(out, gate_up):
        to.copy_(torch.nn.functional.silu(part[:, :inner]) * part[:, inner:])
    return out


def compared(torch, ours, expected):
    """Relative error and share of equal bits."""
    apart = size = same = 0.0
    for a, b in rows_at_a_time(ours, expected):
        a64, b64 = a.double(), b.double()
        apart += (a64 - b64).pow(2).sum().item()
        size += b64.pow(2).sum().item()
        same += (a.view(torch.int16) == b.view(torch.int16)).sum().item()
    return math.sqrt(apart / size) if size else math.sqrt(apart), same / ours.numel()


def check(folder, shape, variants):
    import torch

    begin(torch)
    hidden, inner = SHAPES[shape]
    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    most = max(ROWS_TO_CHECK)
    x_all = torch.randn(most, hidden, device="cuda").to(torch.bfloat16)
    weight = (torch.randn(2 * inner, hidden, device="cuda") * 0.02).to(torch.bfloat16)
    buffer = torch.empty(most + 256, inner, **bf16)
    poison = buffer.view(torch.int16)

    def run(kernel, x, weight, what):
        """out, after looking at the rows behind it and for elements that were not written."""
        rows = x.shape[0]
        poison[: rows + 256].fill_(POISON)
        kernel.prepare(x, weight, buffer)()
        watched(torch, what)
        problems = []
        if not (poison[rows : rows + 256] == POISON).all().item():
            problems.append("WRITES BEYOND ITS ROWS")
        left = sum((part == POISON).sum().item() for part in poison[:rows].split(4096))
        if left:
            problems.append(f"LEAVES {left} ELEMENTS UNWRITTEN")
        return buffer[:rows], problems

    expected = {rows: None for rows in ROWS_TO_CHECK}
    third = lambda *size: torch.randint(-1, 2, size, device="cuda").to(torch.bfloat16)
    whole = third(1000, hidden), third(2 * inner, hidden) / 16
    whole_expected = reference(torch, *whole, inner)
    single = torch.zeros(200, hidden, **bf16)
    single[torch.arange(200), torch.arange(200) * 7 % hidden] = 1
    large = (torch.randn(2 * inner, hidden, device="cuda") * 60).to(torch.bfloat16)
    large[:4, 0] = torch.tensor([200.0, -200.0, 0.0, -60.0], device="cuda")
    single_expected = reference(torch, single, large, inner)
    odd = x_all[:300].clone()
    odd[5, 0], odd[7, 1] = float("inf"), float("nan")
    odd_expected = reference(torch, odd, weight, inner)

    for variant in variants:
        print(f"@{variant}", flush=True)
        kernel = Fused(torch, folder, shape, variant)
        worst_error, least_same, problems, cells = 0.0, 1.0, [], []
        for rows in ROWS_TO_CHECK:
            x = x_all[:rows]
            if expected[rows] is None:
                expected[rows] = reference(torch, x, weight, inner)
            ours, found = run(kernel, x, weight, f"{shape} {variant} {rows} rows")
            error, same = compared(torch, ours, expected[rows])
            problems += [f"{rows} rows: {problem}" for problem in found]
            if not error < 1e-2:
                bad = (~((ours.float() - expected[rows].float()).abs() < 0.05 + 0.02 * expected[rows].float().abs())).nonzero()
                problems.append(f"{rows} rows: error {error:.2e}, {len(bad)} elements wrong, first {bad[:3].tolist()}, "
                                f"last {bad[-1:].tolist()}")
            if rows == 4097:
                # A race shows as a result that changes.
                once, again = ours.clone(), kernel.prepare(x, weight, buffer)
                for _ in range(5):
                    again(), again()
                    watched(torch, f"{shape} {variant} {rows} rows again")
                    if not torch.equal(once.view(torch.int16), poison[:rows]):
                        problems.append("CHANGES FROM RUN TO RUN")
                        break
                del once
            worst_error, least_same = max(worst_error, error if error == error else math.inf), min(least_same, same)
            cells.append(f"{rows}: {error:.1e} {same * 100:.2f} %")
            if rows == 1000 and variant == variants[0]:
                gate_up = x.float() @ weight.float().t()
                exact = torch.nn.functional.silu(gate_up[:, :inner]) * gate_up[:, inner:]
                cells.append(f"(against float: ours {compared(torch, ours, exact.to(torch.bfloat16))[0]:.3e}, "
                             f"torch {compared(torch, expected[rows], exact.to(torch.bfloat16))[0]:.3e})")
                del gate_up, exact
        ours, found = run(kernel, *whole, f"{shape} {variant} whole numbers")
        whole_error, whole_same = compared(torch, ours, whole_expected)
        ours, more = run(kernel, single, large, f"{shape} {variant} one of a row")
        single_error, single_same = compared(torch, ours, single_expected)
        if not ours.isfinite().all().item():
            problems.append("LARGE GATES MAKE NAN OR INFINITY")
        problems += found + more
        ours, found = run(kernel, odd, weight, f"{shape} {variant} inf and NaN")
        problems += [problem for problem in found if "BEYOND" in problem]
        if not ((ours.isnan() == odd_expected.isnan()).all() and (ours.isinf() == odd_expected.isinf()).all()).item():
            problems.append("INF OR NAN IS LOST")
        if whole_same < 0.999:
            problems.append(f"WHOLE NUMBERS DIFFER: {(1 - whole_same) * 100:.2f} %")
        print(f"| {shape} {variant} | error {worst_error:.1e} | equal {least_same * 100:.2f} % | whole numbers {whole_error:.1e}, "
              f"{whole_same * 100:.3f} % | one of a row {single_error:.1e}, {single_same * 100:.3f} % | "
              f"{'; '.join(problems[:4]) if problems else 'good'} |", flush=True)
        if variant == variants[0]:
            print("  by rows: " + ", ".join(cells), flush=True)
        print(f"={variant} {'bad' if problems else 'good'}", flush=True)


# -----------------------------------------------------------------------------------------------------------------------------


class Sampler:
    """Clock in MHz and power in W while something runs."""

    def __init__(self):
        self.samples, self.stopped, self.thread = [], False, None
        try:
            self.nvml = ctypes.CDLL("libnvidia-ml.so.1")
            self.device = ctypes.c_void_p()
            good = self.nvml.nvmlInit_v2() == 0
            good = good and self.nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.device)) == 0
        except OSError:
            good = False
        if good:
            self.thread = threading.Thread(target=self.loop, daemon=True)
            self.thread.start()

    def loop(self):
        while True:
            clock, power = ctypes.c_uint(), ctypes.c_uint()
            if self.nvml.nvmlDeviceGetClockInfo(self.device, 1, ctypes.byref(clock)) == 0:
                if self.nvml.nvmlDeviceGetPowerUsage(self.device, ctypes.byref(power)) == 0:
                    self.samples.append((time.time(), clock.value, power.value / 1000))
            time.sleep(0.05)

    def between(self, start, end):
        inside = [sample[1:] for sample in self.samples if start <= sample[0] <= end]
        return tuple(statistics.mean(column) for column in zip(*inside)) if inside else (0, 0)


def measure(torch, sampler, works, rounds, slot):
    """By name: milliseconds of each round, clock, power. One after the other in each round, `slot` seconds each."""
    mark = lambda: torch.cuda.Event(enable_timing=True)
    repeats, times, clocks, powers = {}, {name: [] for name in works}, {name: [] for name in works}, {name: [] for name in works}
    for name, work in works.items():
        print(f"@{name.removeprefix('ours ')}", flush=True)
        work()
        watched(torch, name)
        start, end = mark(), mark()
        start.record()
        for _ in range(3):
            work()
        end.record()
        watched(torch, name)
        repeats[name] = max(3, int(slot * 1000 / (start.elapsed_time(end) / 3)))
    for _ in range(rounds):
        for name, work in works.items():
            start, end = mark(), mark()
            before = time.time()
            start.record()
            for _ in range(repeats[name]):
                work()
            end.record()
            end.synchronize()
            after = time.time()
            times[name].append(start.elapsed_time(end) / repeats[name])
            clock, power = sampler.between(before + (after - before) / 2, after)
            clocks[name].append(clock), powers[name].append(power)
    return {name: (statistics.median(times[name]), times[name], statistics.median(clocks[name]), statistics.median(powers[name]))
            for name in works}


def timing(folder, shape, variants, seconds):
    ends = time.time() + seconds
    import torch

    begin(torch)
    hidden, inner = SHAPES[shape]
    most, bf16 = max(ROWS_TO_TIME[shape]), dict(device="cuda", dtype=torch.bfloat16)
    x_all = torch.randn(most, hidden, device="cuda").to(torch.bfloat16)
    weight = (torch.randn(2 * inner, hidden, device="cuda") * 0.02).to(torch.bfloat16)
    gate_up_all, out_all = torch.empty(most, 2 * inner, **bf16), torch.empty(most, inner, **bf16)
    try:
        card = own_kernels.Card(torch, own_kernels.shapes()[shape])
    except (Exception, SystemExit) as error:
        print(f"no silu_up kernel of the repository, torch's silu is timed instead: {error}", flush=True)
        card = None
    kernels = {variant: Fused(torch, folder, shape, variant) for variant in variants}
    sampler = Sampler()
    best, document = None, {}
    for rows in ROWS_TO_TIME[shape]:
        x, gate_up, out = x_all[:rows], gate_up_all[:rows], out_all[:rows]
        flop = 4 * rows * hidden * inner
        ours = {f"ours {variant}": kernels[variant].prepare(x, weight, out) for variant in variants}

        def product(x=x, gate_up=gate_up):
            torch.mm(x, weight.t(), out=gate_up)

        def product_and_silu(product=product, gate_up=gate_up, out=out, rows=rows):
            product()
            if card:
                card.launch("silu_up", rows, gate_up, out, lines=card.shape.silu_lines)
            else:
                torch.mul(torch.nn.functional.silu(gate_up[:, :inner]), gate_up[:, inner:], out=out)

        def show(title, measured):
            print(f"{shape}, {rows} rows, {title}")
            for name, (median, each, clock, power) in measured.items():
                print(f"| {name} | {median:.3f} ms | {flop / median / 1e9:.0f} TFLOP/s | "
                      f"{' '.join(f'{flop / one / 1e9:.0f}' for one in each)} | {clock:.0f} MHz, {power:.0f} W |", flush=True)
            document[f"{rows} {title}"] = measured

        if best is None:
            # All variants against each other first, then the best of them against torch.
            slot = max(0.1, min(0.4, (ends - time.time()) * 0.3 / (2 * (len(ours) + 1))))
            measured = measure(torch, sampler, {"mm": product, **ours}, 2, slot)
            show("all variants", measured)
            best = min(ours, key=lambda name: measured[name][0])
        contestants = {best: ours[best], "mm": product, "mm and silu_up": product_and_silu}
        if best != "ours base" and "ours base" in ours:
            contestants["ours base"] = ours["ours base"]
        left = len(ROWS_TO_TIME[shape]) - ROWS_TO_TIME[shape].index(rows)
        slot = max(0.1, min(1.0, (ends - time.time() - 0.5) * 0.9 / left / (3 * len(contestants))))
        measured = measure(torch, sampler, contestants, 3, slot)
        show(f"rounds of {slot:.2f} s", measured)
        print(f"{shape}, {rows} rows: {best} takes {measured[best][0] / measured['mm and silu_up'][0]:.3f} of mm and silu_up, "
              f"{measured[best][0] / measured['mm'][0]:.3f} of mm alone", flush=True)
    print("JSON " + json.dumps(dict(shape=shape, best=best, measured=document)), flush=True)


# -----------------------------------------------------------------------------------------------------------------------------
# The parent.


class Child:
    def __init__(self, *arguments, seconds):
        self.marker, self.good, self.ends = "", set(), time.time() + seconds
        self.lines, self.bad, self.timed_out = [], set(), False
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), *arguments], text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            if line.startswith("@"):
                self.marker = line[1:].strip()
            elif line.startswith("="):
                name, verdict = line[1:].split()
                (self.good if verdict == "good" else self.bad).add(name)
                self.marker = ""
            elif line.startswith("JSON "):
                self.lines.append(line[5:])
            else:
                print(line, end="", flush=True)

    def wait(self):
        """Whether it ended well."""
        try:
            self.process.wait(timeout=max(1, self.ends - time.time()))
        except subprocess.TimeoutExpired:
            self.timed_out = True
            self.process.kill()
            self.process.wait()
        self.reader.join(timeout=2)
        return self.process.returncode == 0


def check_all(folder, shape, variants, until, verdicts):
    """Starts again without the variant that broke, while there is time."""
    left, good = list(variants), set()
    while left and time.time() < until - 5:
        child = Child("--child", "check", folder, shape, ",".join(left), seconds=min(SECONDS_OF_A_CHILD, until - time.time()))
        ended_well = child.wait()
        good |= child.good
        if ended_well:
            break
        print(f"FAILED: check of {shape} at {child.marker or 'the start'}"
              + (f", killed" if child.timed_out else f", exit status {child.process.returncode}"), flush=True)
        left = [name for name in left if name not in child.good | child.bad | {child.marker}]
        if not child.marker:
            break
    verdicts[shape] = good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--budget", type=float, default=90)
    parser.add_argument("--json", help="file for the timings")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, folder, shape, variants, *rest = arguments.child
        if what == "check":
            check(folder, shape, variants.split(","))
        else:
            timing(folder, shape, variants.split(","), float(rest[0]))
        return
    started = time.time()
    deadline = started + arguments.budget
    variants = arguments.variants.split(",")
    with tempfile.TemporaryDirectory() as folder:
        tasks = [(folder, shape, variant) for shape in SHAPES for variant in variants]
        with multiprocessing.Pool(min(12, os.cpu_count() or 1)) as pool:
            for shape, variant, log in pool.imap_unordered(compile_one, tasks):
                if log:
                    print(f"compiling {shape} {variant}: {log[:600]}", flush=True)
        print(f"compiled after {time.time() - started:.0f} s", flush=True)
        verdicts, until = {}, time.time() + min(SECONDS_OF_A_CHILD, arguments.budget * 0.4)
        threads = [threading.Thread(target=check_all, args=(folder, shape, variants, until, verdicts)) for shape in SHAPES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        good = [name for name in variants if all(name in verdicts.get(shape, set()) for shape in SHAPES)]
        print(f"checked after {time.time() - started:.0f} s; good in all shapes: {', '.join(good) or 'NONE'}", flush=True)
        documents = []
        for number, shape in enumerate(ROWS_TO_TIME):
            usable = [name for name in variants if name in verdicts.get(shape, set())]
            seconds = min(SECONDS_OF_A_CHILD - 5, (deadline - time.time()) / (len(ROWS_TO_TIME) - number) - 3)
            if not usable or seconds < 8:
                print(f"{shape} is not timed: " + ("no variant is right" if not usable else "no time left"))
                continue
            child = Child("--child", "time", folder, shape, ",".join(usable), str(seconds), seconds=min(SECONDS_OF_A_CHILD, seconds + 5))
            if not child.wait():
                print(f"FAILED: timing of {shape} at {child.marker}" + (", killed" if child.timed_out else ""), flush=True)
            documents += map(json.loads, child.lines)
        if arguments.json:
            own_kernels.write(arguments.json, documents)
    print(f"done after {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
