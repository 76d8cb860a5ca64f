"""Time and memory of the loss, forward + backward: both exact forms, lightly, a textbook formula, and that compiled

Every contender lives in a process of its own. They take turns, so that all see the same machine; a time is the median
over the turns, with the fastest and slowest turn. Memory is the peak above what the process held with its inputs.

    python benchmarks/loss.py                          # the grid, about 16 minutes on 2 cores
    python benchmarks/loss.py --n 256 --d 2048 8192    # some cells
    python benchmarks/loss.py --device cuda
"""
import argparse
import ctypes
import gc
import logging
import multiprocessing as mp
import os
import statistics
import time
import warnings

from _common import machine

CONTENDERS = {"gram": "ours, Gram", "direct": "ours, D x D", "lightly": "lightly", "textbook": "textbook", "compiled": "textbook compiled"}
MATRICES = {"gram": 0, "direct": 2, "lightly": 4, "textbook": 4, "compiled": 3}   # D x D matrices alive at once


def textbook(z1, z2, lmb=5e-3, eps=1e-5):
    z1, z2 = ((z - z.mean(0))/(z.var(0, correction=0) + eps).sqrt() for z in (z1, z2))
    c = z1.T @ z2/len(z1)
    diag = c.diagonal()
    return (diag - 1).square().sum() + lmb*(c.square().sum() - diag.square().sum())


def loss_of(name):
    import torch
    if name in ("gram", "direct"):
        from self_supervised_bt.losses import barlow_twins_loss
        return lambda a, b: barlow_twins_loss(a, b, form=name)
    if name == "lightly":
        from lightly.loss import BarlowTwinsLoss
        return BarlowTwinsLoss(lambda_param=5e-3)
    return textbook if name == "textbook" else torch.compile(textbook, dynamic=False)


def status(key):
    return next(int(line.split()[1])*1024 for line in open("/proc/self/status") if line.startswith(key))


class Worker:
    "One contender: holds the inputs of one cell, and does one thing when asked"
    def __init__(self, name, device):
        import torch
        warnings.filterwarnings("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)   # says there is no GPU
        self.torch, self.device, self.loss = torch, device, loss_of(name)

    def inputs(self, n, d):
        self.torch._dynamo.reset()   # every shape is compiled afresh: past eight shapes it would run uncompiled
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
        return float(value), float(grad.double().norm()), float((grad.double()*self.z[1].double()).sum())

    def seconds(self, calls):
        if calls > 1: self.step()   # what the others left in the caches is not counted against a short call
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
        before = status("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")   # the high-water mark starts anew
        self.step()
        return status("VmHWM") - before

    def product_rate(self):
        a = self.torch.randn(2048, 2048, device=self.device)
        for _ in range(3): a @ a
        rates = []
        for _ in range(9):
            if self.device != "cpu": self.torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(1 if self.device == "cpu" else 100): a @ a
            if self.device != "cpu": self.torch.cuda.synchronize()
            rates.append(2*2048**3*(1 if self.device == "cpu" else 100)/(time.perf_counter() - start))
        return statistics.median(rates)


def serve(name, device, pipe):
    worker = Worker(name, device)
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        try: pipe.send((True, getattr(worker, request[0])(*request[1:])))
        except Exception as e: pipe.send((False, f"{type(e).__name__}: {str(e).splitlines()[0][:80]}"))


class Contender:
    def __init__(self, name, device):
        context = mp.get_context("spawn")
        self.name, (self.pipe, child) = name, context.Pipe()
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
    "Seconds of every turn, peak bytes and results, by contender; a contender that fails is named with its message"
    seconds, peaks, results, failed = {}, {}, {}, {}
    for c in contenders:
        try:
            c.ask("inputs", n, d)
            results[c.name], once = c.ask("result"), c.ask("seconds", 1)
            peaks[c.name], seconds[c.name] = c.ask("peak"), []
        except RuntimeError as e: failed[c.name] = str(e)
    calls = max(1, min(20, int(.1/once))) if seconds else 1
    for _ in range(repeats if calls == 1 else 3*repeats):   # short calls scatter more
        for c in contenders:
            if c.name in failed: continue
            time.sleep(.01)   # let the last one's threads fall asleep
            seconds[c.name].append(c.ask("seconds", calls))
    for c in contenders: c.ask("inputs", 2, 2)   # give the memory back
    return seconds, peaks, results, failed


def apart(results):
    "Largest relative difference in value and gradient between contenders"
    return max((abs(r[i] - ref[i])/abs(ref[i]) for ref in [next(iter(results.values()))] for r in results.values() for i in range(3)), default=0)


def cell_lines(n, d, measured, skipped, rate, chosen):
    "The three lines of a cell: times, memory, ratios"
    seconds, peaks, results, failed = measured
    ms = {k: 1e3*statistics.median(v) for k, v in seconds.items()}
    texts = {k: f"{ms[k]:.4g} ({1e3*min(v):.4g}-{1e3*max(v):.4g})" for k, v in seconds.items()} | skipped | failed
    yield f"{n:5} {d:6} | ms | " + " | ".join(f"{texts[k]:>23}" for k in CONTENDERS)
    yield f"{'':12} | MB | " + " | ".join(f"{f'{peaks[k]/2**20:.0f}' if k in peaks else '':>23}" for k in CONTENDERS)
    if chosen not in ms: return
    floor = flops(chosen, n, d)/rate*1e3
    ratio = {k: statistics.median(theirs/ours for theirs, ours in zip(seconds[k], seconds[chosen])) for k in seconds}   # turn by turn
    peers = {k: ms[k] for k in ("lightly", "textbook") if k in ms}
    half = f" [{ms[chosen]/floor/.75:.2f} x]" if chosen == "gram" else ""
    line = f"{'':12} |    | we take {CONTENDERS[chosen][6:]}: {ms[chosen]/floor:.2f} x{half} the floor of {floor:.3g} ms ({rate/1e9:.0f} GFLOP/s)"
    if peers:
        best = min(peers, key=peers.get)
        line += f"; {ratio[best]:.2f} x as fast as {best}, 1/{peaks[best]/max(1, peaks[chosen]):.1f} of its memory"
    if "compiled" in ms: line += f"; {ratio['compiled']:.2f} x as fast as compiled"
    yield line + f"; results within {apart(results):.0e}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, nargs="+", default=[32, 128, 256, 1024, 4096], help="batch sizes")
    p.add_argument("--d", type=int, nargs="+", default=[128, 512, 2048, 8192, 65536], help="embedding widths")
    p.add_argument("--repeats", type=int, default=5, help="turns of every contender")
    p.add_argument("--most", type=float, default=2., help="leave out what takes more than so many TFLOP a call")
    p.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders")
    p.add_argument("--keep", action="store_true", help="freed memory stays with the process, for every contender: what is left without page faults")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    from self_supervised_bt.losses import cheaper_form
    if args.keep: os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**40))   # glibc reads them when a process starts
    contenders = [Contender(name, args.device) for name in args.only]
    available = gpu_memory() if args.device != "cpu" else 1024*next(int(l.split()[1]) for l in open("/proc/meminfo") if l.startswith("MemAvailable"))
    print(machine("lightly") + (f", {args.device}" if args.device != "cpu" else ""))
    print(f"forward + backward, float32; {args.repeats} turns or more: median (fastest-slowest); peak memory above the inputs")
    print("floor = the form's matrix products, 8 N² D or 6 N D² operations, at the rate of a 2048 x 2048 float32 product measured beside")
    print("each cell; in brackets with the two symmetric products of the Gram form counted half, 6 N² D\n")
    print(f"{'N':>5} {'D':>6} |    | " + " | ".join(f"{c:>23}" for c in CONTENDERS.values()), flush=True)
    for n in args.n:
        for d in args.d:
            skipped = {name: why for name in args.only if (why := left_out(name, n, d, args, available))} | {k: "" for k in CONTENDERS if k not in args.only}
            measured = measure([c for c in contenders if c.name not in skipped], n, d, args.repeats)
            rate = contenders[0].ask("product_rate")
            print(*cell_lines(n, d, measured, skipped, rate, cheaper_form(n, d)), sep="\n", flush=True)
    for c in contenders: c.stop()


def gpu_memory():
    import torch
    return torch.cuda.mem_get_info()[0]


if __name__ == "__main__": main()
