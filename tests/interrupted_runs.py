"""Interrupt `bt_pretrain` in the ways of terminals, schedulers and disks, resume it, and compare with an unbroken run.

    python tests/interrupted_runs.py                   # all, about 20 minutes on two cores; a table
    python tests/interrupted_runs.py --only SIGTERM    # those whose name holds this text

A row says what the command's last lines were, its exit status, what was on the disk, and whether the run that was
resumed by the command that the terminal named has the same bytes of weights and of epochs as a run without a break.
A full disk is a small tmpfs, which only root can mount.
"""
import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from conftest import class_pictures
from PIL import Image

OPTIONS = "--arch timm/test_resnet --width 16 --bs 16 --epochs 12 --every 3".split()
PROGRAM = Path(sys.executable).with_name("bt_pretrain")
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
STATUS = dict(SIGINT=130, SIGTERM=143, SIGUSR1=75)
LIMIT = 150   # seconds
# torchrun's own last words
LAUNCHER = re.compile(r"^Traceback.*\n(?: .*\n)+torch\.distributed\.elastic.*\n(?:.*\n)*", re.M)


class Ended(NamedTuple):
    "What is left of a command"
    status: int
    text: str    # standard output and error, in their order
    files: list  # names in the folder of the run, when it ended

    @property
    def said(self):
        "The lines below the table of epochs, without those of torchrun"
        table = re.compile(r"^ +(epoch|\d+/\d+) .*|^[WEI]\d{4} .*|^ *$|^\*+$|^Setting OMP|^\[rank\d\]:\[W.*")
        return [line for line in LAUNCHER.sub("", self.text).splitlines() if not table.match(line)]


def start(command, cwd):
    "The command, in a process group of its own"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    out = open(cwd/"terminal.txt", "w+")
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=out, start_new_session=True), out


def ended(process, out, cwd, name="run"):
    "Wait for the end, which must come"
    try: process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: not alive(cwd), 30)   # ranks may outlive their launcher for a moment
    out.seek(0)
    files = sorted(f.name for f in (cwd/name).iterdir()) if (cwd/name).is_dir() else []
    return Ended(process.returncode, out.read(), files)


def alive(cwd):
    "Processes that work in this folder"
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try: here = os.readlink(p/"cwd") == str(cwd) and p.name != str(os.getpid())
        except OSError: continue
        if here and " Z " not in (p/"stat").read_text(): found.append(int(p.name))
    return found


def run(command, cwd): return ended(*start(command, cwd), cwd)


def wait_for(done, seconds=LIMIT):
    "Is it done in time?"
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until: return False
        time.sleep(.002)
    return True


# Moments, as the folder of the run shows them

def at_once(cwd): return lambda: True
def settings_written(cwd): return lambda: (cwd/"run/run.json").exists()
def mid_epoch(cwd): return lambda: (cwd/"run/step-0000000009.pt").exists()
def results_written(cwd): return lambda: (cwd/"run/encoder.safetensors").exists()


MOMENTS = {"during the imports": (at_once, 1.5), "before the first checkpoint": (settings_written, 0),
           "mid epoch": (mid_epoch, 0), "while results are written": (results_written, 0)}


def resume_of(said):
    "The command that the terminal names"
    found = re.findall(r"continue with (bt_pretrain .*)", "\n".join(said))
    return shlex.split(found[-1])[1:] if found else None


def outcome(cwd):
    "The bytes that a run ends with"
    return [(cwd/"run"/name).read_bytes() if (cwd/"run"/name).exists() else None
            for name in ("encoder.safetensors", "history.csv")]


class Row(NamedTuple):
    name: str
    status: int
    lines: list
    disk: str
    resumed: str
    ok: bool

    def __str__(self):
        lines = "".join(f"\n         | {line[:300]}" for line in self.lines)
        return (f"{'ok  ' if self.ok else 'FAIL'} {self.name}: exit {self.status}; on disk {self.disk or 'nothing'}; "
                f"{self.resumed}{lines}")


def disk(files):
    "The files in a few words"
    steps = [f for f in files if f.startswith("step-")]
    rest = [f for f in files if not f.startswith("step-")]
    return ", ".join([*rest, *([f"{len(steps)} checkpoints to {steps[-1]}"] if steps else [])])


def judged(name, first, whole, cwd, prefix, command, status, most=2):
    "Resume as the terminal says, and compare"
    options = resume_of(first.said)
    again = run([*prefix, PROGRAM, *options] if options else command, cwd)
    same = outcome(cwd) == whole
    how = "resumed" if options else "started again"
    silent = prefix and not first.files   # torchrun had started no rank that could say anything
    quiet = "Traceback" not in "\n".join(first.said) and (silent or 1 <= len(first.said) <= most)
    clean = not [f for f in first.files if f.startswith(".")]
    result = f"{how}: {'same bytes' if same else f'DIFFERENT, exit {again.status}: ' + again.text[-800:]}"
    if not clean: result += "; hidden files left"
    return Row(name, first.status, first.said, disk(first.files), result,
               same and quiet and clean and (first.status in status))


def interrupted(name, moment, signals, prefix, images, whole, cwd):
    "Send signals to the whole group at a moment"
    command = [*prefix, PROGRAM, images, *OPTIONS, "--workers", "1", "--out", "run"]
    process, out = start(command, cwd)
    reached, later = MOMENTS[moment]
    wait_for(lambda: reached(cwd)() or process.poll() is not None)
    time.sleep(later)
    for s in signals:
        if process.poll() is None: os.killpg(process.pid, getattr(signal, s))
    first = ended(process, out, cwd)
    last = signals[-1]
    status = [STATUS.get(last, -9)] if not prefix else [1, 130, 143, -2, -9, -10, -15]   # torchrun has its own
    return judged(name, first, whole, cwd, prefix, command, status)


# Disks, folders, and two commands at once

def full_disk(size, images, whole, cwd):
    "The run's folder is a file system of `size`; afterwards there is room"
    (cwd/"run").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", cwd/"run"], check=True)
    try:
        command = [PROGRAM, images, *OPTIONS, "--workers", "1", "--out", "run"]
        first = run(command, cwd)
        subprocess.run(["mount", "-o", "remount,size=200m", cwd/"run"], check=True)
        return judged(f"disk of {size}", first, whole, cwd, [], command, [1], most=30)
    finally: subprocess.run(["umount", "-l", cwd/"run"], check=True)


def stopped_run(images, cwd):
    "A run that was stopped in mid epoch"
    process, out = start([PROGRAM, images, *OPTIONS, "--workers", "1", "--out", "run"], cwd)
    wait_for(lambda: mid_epoch(cwd)() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGTERM)
    return ended(process, out, cwd)


def resumed_after(name, do, images, whole, cwd, refused, data=(), more=()):
    "Stop a run, change something, resume; if that is `refused`, undo the change and resume"
    own = shutil.copytree(images, cwd/"images")
    stopped_run(own, cwd)
    undo = do(own)
    resume = [PROGRAM, *data, "--out", "run", "--resume", "--workers", "1", "--every", "3"]
    first = run(resume, cwd)
    if not refused:
        same = outcome(cwd) == whole
        result = "same bytes" if same else "DIFFERENT " + first.text[-800:]
        return Row(name, first.status, [], disk(first.files), result,
                   same and first.status == 0)
    undo()
    again = run([PROGRAM, *more, *resume[1 + len(data):]], cwd)
    same = outcome(cwd) == whole
    quiet = len(first.said) == 1 and first.status == 1
    result = f"undone and resumed: {'same bytes' if same else 'DIFFERENT ' + again.text[-800:]}"
    return Row(name, first.status, first.said, disk(first.files), result, same and quiet)


def change_one(own):
    file = own/"dark/01.png"
    pixels = file.read_bytes()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file)
    return lambda: file.write_bytes(pixels)


def rename_one(own):
    file = (own/"dark/01.png").rename(own/"dark/other.png")
    return lambda: file.rename(own/"dark/01.png")


def move(own):
    moved = own.rename(own.with_name("moved"))
    return lambda: moved.rename(own)


def nothing(own): return lambda: None


def at_once_twice(images, whole, cwd):
    "Two commands with other settings start into one folder"
    command = [PROGRAM, images, *OPTIONS, "--workers", "1", "--out", "run"]
    one, out = start(command, cwd)
    with open(cwd/"second.txt", "w+") as text:
        two = subprocess.Popen([*command, "--seed", "5"], cwd=cwd, stdout=text, stderr=text, start_new_session=True)
        statuses = two.wait(LIMIT), one.wait(LIMIT)
        text.seek(0)
        said = [Ended(0, t, []).said for t in (text.read(), (cwd/"terminal.txt").read_text())]
    out.close()
    lost = said[0] if statuses[0] else said[1]
    seed = re.search(r'"seed": (\d)', (cwd/"run/run.json").read_text())[1]
    files = sorted(f.name for f in (cwd/"run").iterdir())
    ok = sorted(statuses) == [0, 1] and len(lost) == 1 and seed == ("0" if statuses[0] else "5")
    same = statuses[0] == 0 or outcome(cwd) == whole
    return Row("two commands at once", statuses, lost, disk(files), f"seed {seed} recorded", ok and same)


def scenarios(images, whole, ranks_whole):
    "Names, and functions of a folder"
    out = {}
    for where, prefix, bytes_ in (("", [], whole), (" under torchrun", RANKS, ranks_whole)):
        for names in (["SIGTERM"], ["SIGINT"], ["SIGUSR1"], ["SIGKILL"], ["SIGTERM", "SIGTERM"]):
            for moment in MOMENTS:
                if len(names) > 1 and moment != "mid epoch": continue
                if names == ["SIGKILL"]: continue
                name = f"{' and '.join(names)} {moment}{where}"
                out[name] = lambda cwd, n=name, m=moment, s=names, p=prefix, b=bytes_: interrupted(
                    n, m, s, p, images, b, cwd)
    for size in ("1m", "3m", "8m", "14m", "20m"):
        out[f"disk of {size}"] = lambda cwd, size=size: full_disk(size, images, whole, cwd)
    changes = {"images moved": (move, True, []), "images moved, named": (move, False, ["moved"]),
               "one image changed": (change_one, True, []), "one image renamed": (rename_one, True, []),
               "folder spelled relative": (nothing, False, ["./images"]),
               "folder spelled with a slash": (nothing, False, ["images/../images/"])}
    for name, (do, refused, data) in changes.items():
        out[name] = lambda cwd, n=name, d=do, r=refused, a=data: resumed_after(n, d, images, whole, cwd, r, a)
    out["two commands at once"] = lambda cwd: at_once_twice(images, whole, cwd)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        images = class_pictures(tmp/"images", 80)
        whole = {}
        for name, prefix in (("one", []), ("ranks", RANKS)):
            if name == "ranks" and "torchrun" not in a.only and a.only: continue
            (tmp/name).mkdir()
            run([*prefix, PROGRAM, images, *OPTIONS, "--workers", "1", "--out", "run"], tmp/name)
            whole[name] = outcome(tmp/name)
            assert None not in whole[name], (tmp/name/"terminal.txt").read_text()
        rows = []
        for i, (name, f) in enumerate(scenarios(images, whole["one"], whole.get("ranks")).items()):
            if not re.search(a.only, name): continue
            (tmp/str(i)).mkdir()
            rows.append(f(tmp/str(i)))
            print(rows[-1], flush=True)
            shutil.rmtree(tmp/str(i))
    print(f"{sum(r.ok for r in rows)} of {len(rows)} as they should be")
    sys.exit(not all(r.ok for r in rows))


if __name__ == "__main__": main()
