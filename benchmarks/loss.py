"""Time and memory of the loss, forward + backward: both exact forms, lightly, the textbook formula, and that compiled

Each contender has its own process. They take turns, so that all see the same machine. A time is the median over the
turns, with the fastest and slowest turn. Memory is the peak above what the process held with its inputs.

    python benchmarks/loss.py                          # the grid, about 16 minutes on 2 cores
    python benchmarks/loss.py --n 256 --d 2048 8192    # some cells
    python benchmarks/loss.py --device cuda
"""
import argparse
import ctypes
import gc
import itertools
import logging
import multiprocessing as mp
import os
import statistics
import time
import warnings

from _common import machine

CONTENDERS = {
    "gram": "ours, Gram",
    "direct": "ours, D x D",
    "lightly": "lightly",
    "textbook": "textbook",
    "compiled": "textbook compiled",
}
MATRICES = {"gram": 0, "direct": 2, "lightly": 4, "textbook": 4, "compiled": 3}   # D x D matrices alive at once


def textbook(z1, z2, lmb=5e-3, eps=1e-5):
    "The loss with its matrix"
    z1, z2 = ((z - z.mean(0))/(z.var(0, correction=0) + eps).sqrt() for z in (z1, z2))
    c = z1.T @ z2/len(z1)
    diag = c.diagonal()
    return (diag - 1).square().sum() + lmb*(c.square().sum() - diag.square().sum())


def loss_of(name):
    "Function of (z1,z2) of a contender"
    import torch
    if name in ("gram", "direct"):
        from self_supervised_bt.losses import barlow_twins_loss
        return lambda a, b: barlow_twins_loss(a, b, form=name)
    if name == "lightly":
        from lightly.loss import BarlowTwinsLoss
        return BarlowTwinsLoss(lambda_param=5e-3)
    return textbook if name == "textbook" else torch.compile(textbook, dynamic=False)


def kilobytes(file, key):
    "The number after `key`, in bytes"
    with open(file) as lines:
        return next(int(line.split()[1])*1024 for line in lines if line.startswith(key))


class Worker:
    "One contender: holds the inputs of one cell, and answers one request at a time"
    def __init__(self, name, device):
        import torch
        warnings.filterwarnings("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)   # says there is no GPU
        self.torch, self.device, self.loss = torch, device, loss_of(name)

    def inputs(self, n, d):
        self.torch._dynamo.reset()   # each shape is compiled anew: after eight shapes it would run uncompiled
        g = self.torch.Generator().manual_seed(0)
        self.z = [self.torch.randn(n, d, generator=g).to(self.device) for _ in range(2)]
        self.z[1] += self.z[0]

    def step(self):
        z = [z.detach().requires_grad_() for z in self.z]
        value = self.loss(*z)
        value.backward()
        if self.device != "cpu": self.torch.cuda.synchronize()
        return value.detach(), z[0].grad

    def result(self):
        value, grad = self.step()
        grad = grad.double()
        return float(value), float(grad.norm()), float((grad*self.z[1].double()).sum())

    def seconds(self, calls):
        if calls > 1: self.step()   # warm up: the caches hold what the others left
        out = []
        for _ in range(calls):
            start = time.perf_counter()
            self.step()
            out.append(time.perf_counter() - start)
        return statistics.median(out)

    def peak(self):
        gc.collect()
        if self.device != "cpu":
            before = self.torch.cuda.memory_allocated()
            self.torch.cuda.reset_peak_memory_stats()
            self.step()
            return self.torch.cuda.max_memory_allocated() - before
        ctypes.CDLL(None).malloc_trim(0)
        before = kilobytes("/proc/self/status", "VmRSS")
        with open("/proc/self/clear_refs", "w") as f: f.write("5")   # reset the high-water mark
        self.step()
        return kilobytes("/proc/self/status", "VmHWM") - before

    def product_rate(self):
        "Operations per second of a large float32 matrix product"
        a = self.torch.randn(2048, 2048, device=self.device)
        times = 1 if self.device == "cpu" else 100
        for _ in range(3): a @ a
        rates = []
        for _ in range(9):
            if self.device != "cpu": self.torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(times): a @ a
            if self.device != "cpu": self.torch.cuda.synchronize()
            rates.append(2*2048**3*times/(time.perf_counter() - start))
        return statistics.median(rates)


def serve(name, device, pipe):
    "A contender's process"
    worker = Worker(name, device)
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        method, *args = request
        try: pipe.send((True, getattr(worker, method)(*args)))
        except Exception as e: pipe.send((False, f"{type(e).__name__}: {str(e).splitlines()[0][:80]}"))


class Contender:
    "A contender as the main process sees it"
    def __init__(self, name, device):
        context = mp.get_context("spawn")
        self.name = name
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=serve, args=(name, device, child), daemon=True)
        self.process.start()
        self.pipe.recv()

    def ask(self, *request):
        self.pipe.send(request)
        fine, answer = self.pipe.recv()
        if not fine: raise RuntimeError(answer)
        return answer

    def stop(self):
        self.pipe.send(None)
        self.process.join()


def flops(name, n, d): return 8*n*n*d if name == "gram" else 6*n*d*d


def left_out(name, n, d, args, available):
    "Why a cell is not measured, or nothing"
    need = 4*(MATRICES[name]*d*d + 8*n*d + 3*n*n)
    if need > .9*available: return f"needs {need/2**30:.0f} GB"
    if flops(name, n, d) > args.most*1e12: return f"{flops(name, n, d)/1e12:.1f} TFLOP"


def measure(contenders, n, d, repeats):
    "Seconds of every turn, peak bytes and results, by contender; and the messages of those that fail"
    seconds, peaks, results, failed = {}, {}, {}, {}
    for c in contenders:
        try:
            c.ask("inputs", n, d)
            results[c.name] = c.ask("result")
            once = c.ask("seconds", 1)
            peaks[c.name] = c.ask("peak")
            seconds[c.name] = []
        except RuntimeError as e: failed[c.name] = str(e)
    calls = max(1, min(20, int(.1/once))) if seconds else 1
    for _ in range(repeats if calls == 1 else 3*repeats):   # short calls scatter more
        for c in contenders:
            if c.name in failed: continue
            time.sleep(.01)   # the threads of the last one go to sleep
            seconds[c.name].append(c.ask("seconds", calls))
    for c in contenders: c.ask("inputs", 2, 2)   # frees the memory
    return seconds, peaks, results, failed


def difference(results):
    "Largest relative difference in value and gradient from the first contender"
    if not results: return 0
    first = next(iter(results.values()))
    return max(abs(theirs - ours)/abs(ours) for r in results.values() for theirs, ours in zip(r, first))


def cell_lines(n, d, measured, skipped, rate, chosen):
    "The three lines of a cell: times, memory, ratios"
    seconds, peaks, results, failed = measured
    ms = {k: 1e3*statistics.median(v) for k, v in seconds.items()}
    times = {k: f"{ms[k]:.4g} ({1e3*min(v):.4g}-{1e3*max(v):.4g})" for k, v in seconds.items()} | skipped | failed
    memory = {k: f"{peaks[k]/2**20:.0f}" if k in peaks else "" for k in CONTENDERS}
    yield f"{n:5} {d:6} | ms | " + " | ".join(f"{times[k]:>23}" for k in CONTENDERS)
    yield f"{'':12} | MB | " + " | ".join(f"{memory[k]:>23}" for k in CONTENDERS)
    if chosen not in ms: return
    floor = flops(chosen, n, d)/rate*1e3
    times_floor = ms[chosen]/floor
    half = f" [{times_floor/.75:.2f} x]" if chosen == "gram" else ""
    ours = f"we take {CONTENDERS[chosen][6:]}: {times_floor:.2f} x{half} the floor of {floor:.3g} ms"
    theirs = comparison(seconds, ms, peaks, chosen)
    yield f"{'':12} |    | {ours} ({rate/1e9:.0f} GFLOP/s){theirs}; results within {difference(results):.0e}"


def comparison(seconds, ms, peaks, chosen):
    "Speed and memory against the best peer and the compiled formula, turn by turn"
    def ratio(k): return statistics.median(theirs/ours for theirs, ours in zip(seconds[k], seconds[chosen]))
    line = ""
    peers = [k for k in ("lightly", "textbook") if k in ms]
    if peers:
        best = min(peers, key=ms.get)
        line += f"; {ratio(best):.2f} x as fast as {best}, 1/{peaks[best]/max(1, peaks[chosen]):.1f} of its memory"
    if "compiled" in ms: line += f"; {ratio('compiled'):.2f} x as fast as compiled"
    return line


HEAD = """forward + backward, float32; {repeats} turns or more: median (fastest-slowest); peak memory above the inputs
floor = the form's matrix products, 8 N² D or 6 N D² operations, at the rate of a 2048 x 2048 float32 product measured
beside each cell; in brackets with the two symmetric products of the Gram form counted half, 6 N² D
"""


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, nargs="+", default=[32, 128, 256, 1024, 4096], help="batch sizes")
    p.add_argument("--d", type=int, nargs="+", default=[128, 512, 2048, 8192, 65536], help="embedding widths")
    p.add_argument("--repeats", type=int, default=5, help="turns of every contender")
    p.add_argument("--most", type=float, default=2., help="leave out what takes more than so many TFLOP per call")
    p.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders")
    p.add_argument("--keep", action="store_true",
                   help="freed memory stays with the process, for every contender: times without page faults")
    p.add_argument("--device", default="cpu")
    return p.parse_args()


def available_memory(device):
    "Bytes"
    if device == "cpu": return kilobytes("/proc/meminfo", "MemAvailable")
    import torch
    return torch.cuda.mem_get_info()[0]


def main():
    args = arguments()
    from self_supervised_bt.losses import cheaper_form
    if args.keep:   # glibc reads these when a process starts
        os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**40))
    contenders = [Contender(name, args.device) for name in args.only]
    available = available_memory(args.device)
    device = f", {args.device}" if args.device != "cpu" else ""
    print(machine("lightly") + device)
    print(HEAD.format(repeats=args.repeats))
    print(f"{'N':>5} {'D':>6} |    | " + " | ".join(f"{c:>23}" for c in CONTENDERS.values()), flush=True)
    for n, d in itertools.product(args.n, args.d):
        reasons = {name: left_out(name, n, d, args, available) for name in args.only}
        skipped = {name: reasons.get(name, "") for name in CONTENDERS if name not in args.only or reasons[name]}
        measured = measure([c for c in contenders if c.name not in skipped], n, d, args.repeats)
        rate = contenders[0].ask("product_rate")
        print(*cell_lines(n, d, measured, skipped, rate, cheaper_form(n, d)), sep="\n", flush=True)
    for c in contenders: c.stop()


if __name__ == "__main__": main()
