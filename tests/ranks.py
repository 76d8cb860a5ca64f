"Ranks of a distributed run as forked processes of this machine, for tests, lessons and benchmarks"
import ctypes
import multiprocessing
import os
import pickle
import re
import socket
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from self_supervised_bt.distributed import setup_ranks


def run_ranks(f, n=2, timeout=60., check=True):
    """What `f(rank)` returned in each of `n` ranks, which exchange over gloo on the CPU

    A rank waits `timeout` seconds for another. If one fails this raises, unless `check=False`: then its error is in
    its place.
    """
    end_idle_threads()
    fork = multiprocessing.get_context("fork")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    running = []
    for rank in range(n):
        receive, send = fork.Pipe(duplex=False)
        process = fork.Process(target=run_one, args=(f, rank, n, store.port, timeout, send), daemon=True)
        process.start()
        send.close()
        running.append((process, receive))
    wait([receive for _, receive in running])   # until one has an answer, or is gone
    out = [answer(rank, n, process, receive, timeout) for rank, (process, receive) in enumerate(running)]
    for process, _ in running: process.join()
    failed = [o for o in out if isinstance(o, Exception)]
    if failed and check: raise RuntimeError("\n\n".join(map(str, failed)))
    return out


def answer(rank, n, process, receive, timeout):
    "What a rank sent, or an error if it ended without an answer or did not answer in time"
    if not receive.poll(timeout): process.kill()
    try: return pickle.loads(receive.recv_bytes())
    except EOFError: return RuntimeError(f"rank {rank} of {n} ended without an answer")


def run_one(f, rank, n, port, timeout, send):
    "The forked process: `f(rank)`, sent as pickled bytes"
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME=loopback,
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",   # the parent's store, as under torchrun
        OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")   # or accelerate sets them, and prints that it does
    torch.set_num_threads(1)   # OpenMP's threads do not survive a fork
    try:
        setup_ranks("gloo", timeout)
        out = f(rank)
        with suppress(RuntimeError): dist.barrier()   # no rank leaves while another still needs an answer
    except BaseException: out = RuntimeError(f"rank {rank} of {n}:\n{traceback.format_exc()}")
    send.send_bytes(pickle.dumps(out))
    send.close()
    sys.stdout.flush()
    os._exit(0)   # without the parent's clean-up


def end_idle_threads():
    "End OpenMP's idle threads: a forked child has none of them, and would wait for them for ever"
    maps = Path("/proc/self/maps")
    loaded = maps.read_text().splitlines() if maps.exists() else []
    for lib in {line.split()[-1] for line in loaded if re.search(r"/lib[gi]?omp[^/]*\.so", line)}:
        with suppress(AttributeError, OSError): ctypes.CDLL(lib).omp_pause_resource_all(2)
