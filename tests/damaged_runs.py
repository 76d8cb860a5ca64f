"""Damage every file of a run in many ways, then resume, evaluate and export it.

    python tests/damaged_runs.py              # about 400 damages, some minutes; a table
    python tests/damaged_runs.py --only json  # files whose name holds this text

A damaged file must give one line, or the right result. Neither a traceback, nor a wrong result without a word, nor a
wait without end is right. A finished run and an unfinished one are damaged.
"""
import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path

from conftest import class_pictures
from safetensors.numpy import load_file

from self_supervised_bt.cli import bt_evaluate, bt_export, bt_pretrain

SMALL = dict(arch="timm/test_resnet", width=16, bs=16, epochs=2, workers=0)
LIMIT = 60   # seconds for one command


def called(f, *args, **kwargs):
    "What a command printed, and how it ended: status, text; the text is a traceback if it raised another error"
    def too_long(*_): raise TimeoutError("it does not end")
    signal.signal(signal.SIGALRM, too_long)
    text, status = io.StringIO(), 0
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text): f(*args, **kwargs)
    except SystemExit as e:
        status = 1 if isinstance(e.code, str) else e.code or 0
        if isinstance(e.code, str): text.write(e.code)
        if isinstance(e.__cause__, TimeoutError): status = "HANG"
    except BaseException:
        status = "TRACEBACK"
        traceback.print_exc(file=text)
    finally: signal.alarm(0)
    return status, text.getvalue()


# Ways to damage a file

def flipped(content, at):
    "One bit less"
    i = min(len(content) - 1, int(at*len(content)))
    return content[:i] + bytes([content[i] ^ 16]) + content[i + 1:]


def zeroed(content, at):
    "A block of zeros"
    i, n = int(at*len(content)), min(4096, max(1, len(content)//4))
    return content[:i] + bytes(len(content[i:i + n])) + content[i + n:]


HTML = b"<!DOCTYPE html><html><body>404: not found</body></html>\n"
WAYS = {"empty": lambda c: b"", "half": lambda c: c[:len(c)//2], "one byte less": lambda c: c[:-1],
        "one byte more": lambda c: c + b"x", "html": lambda c: HTML, "binary": lambda c: bytes(range(256))*9,
        **{f"bit flipped at {at:.0%}": lambda c, at=at: flipped(c, at) for at in (0, .01, .1, .3, .5, .7, .9, .9999)},
        **{f"zeros at {at:.0%}": lambda c, at=at: zeroed(c, at) for at in (0, .25, .5, .75)}}
PLACES = ("missing", "folder", "pipe", "link to itself", "link to nowhere", "of another run", "unreadable device")


def damage(file, way, other):
    "Damage a file in one way; False if the damage is none"
    content = file.read_bytes()
    if way in WAYS:
        new = WAYS[way](content)
        file.write_bytes(new)
        return new != content
    file.unlink()
    if way == "folder": file.mkdir()
    elif way == "pipe": os.mkfifo(file)
    elif way == "link to itself": file.symlink_to(file.name)
    elif way == "link to nowhere": file.symlink_to("nowhere")
    elif way == "unreadable device": file.symlink_to("/dev/full")
    elif way == "of another run":
        if not (other/file.name).exists(): return False
        shutil.copy(other/file.name, file)
    return True


EDITS = dict(data=["/nowhere", "", 7, None, "digits"], base_recipe=["x", None], valid_pct=[.3, -1, "x"], seed=[5, "x"],
             bad=["raise", "x"], half=[True, 3], identity=["x", None], images=[1, None],
             recipe=[{}, None, {"epochs": 1}, {"bs": 8}, {"lr": 9.}, {"arch": "resnet18"}, {"arch": 7}, {"size": 0},
                     {"views": {"recipe": "x"}}, {"epochs": 10**9}, {"nothing": 1}, {"arch_args": {"x": 1}},
                     {"lmb": float("nan")}, {"hidden_size": -1}, {"schedule": "x"}, {"opt": "x"}])


def edit(file, name, value):
    "Change one value of run.json"
    saved = json.loads(file.read_text())
    if name == "recipe" and value: value = {**saved["recipe"], **value}
    file.write_text(json.dumps({**saved, name: value}))


# What is right

def bytes_of(run):
    "The bytes of the weights and epochs, `None` for a file that is not there"
    names = "encoder.safetensors", "history.csv"
    return [(run/name).read_bytes() if (run/name).is_file() else None for name in names]


def judge(status, text, whole, got):
    "In one word"
    if status in ("TRACEBACK", "HANG"): return status
    if "Traceback" in text: return "TRACEBACK"
    if status: return "one line" if len(text.strip().splitlines()[-1:]) == 1 and said_alone(text) else "SEVERAL LINES"
    return "right" if got == whole else "WRONG"


def said_alone(text):
    "Is there one line beside the table of epochs and warnings?"
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r"^ +(epoch|\d+/\d+) ", line)]
    return len([line for line in lines if not line.startswith(("Warning:", "The run in"))]) == 1


def numbers(text): return re.sub(r"\S*/\S*", "", text)   # without paths


def weights_in(file):
    "The tensors of a file, as bytes: its names are in no order"
    if not file.is_file(): return None
    return {k: v.tobytes() for k, v in load_file(file).items()}


def cases(run, only):
    "Pairs of a file's name and a way"
    for file in sorted(f.name for f in run.iterdir()):
        if only not in file: continue
        for way in (*WAYS, *PLACES): yield file, way
    for name, values in EDITS.items():
        if only in "run.json":
            for value in values: yield "run.json", (name, value)


def damaged(run, name, way, other):
    if isinstance(way, tuple): return edit(run/name, *way) or True
    return damage(run/name, way, other)


def tried(run, name, way, images, other, whole, expected, tmp, commands):
    "Damage a copy of a run; a dict from command to verdict and text"
    out = {}
    for command in commands:
        copy = tmp/"copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        if not damaged(copy, name, way, other): return {}
        if command == "resume":
            status, text = called(bt_pretrain, out=str(copy), resume=True, workers=0)
            out[command] = judge(status, text, whole, bytes_of(copy)), text
        elif command == "evaluate":
            status, text = called(bt_evaluate, str(copy), str(images), workers=0)
            out[command] = judge(status, text, expected["evaluate"], numbers(text)), text
        else:
            status, text = called(bt_export, str(copy))
            file = copy/"encoder_timm.safetensors"
            out[command] = judge(status, text, expected["export"], weights_in(file)), text
    shutil.rmtree(tmp/"copy")
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="")
    p.add_argument("--show", action="store_true", help="print what is said in each case")
    a = p.parse_args()
    warnings.showwarning = lambda message, *_: print(f"Warning: {message}", file=sys.stderr)
    warnings.simplefilter("always", UserWarning)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        images = class_pictures(tmp/"images", 60, side=4)
        runs = {name: tmp/name for name in ("finished", "unfinished", "other")}
        for name in ("finished", "other"):
            status, text = called(bt_pretrain, str(images), out=str(runs[name]), seed=int(name == "other"), **SMALL)
            assert status == 0, text
        shutil.copytree(runs["finished"], runs["unfinished"])
        for name in ("encoder.safetensors", "model.safetensors", "results.json"):
            (runs["unfinished"]/name).unlink()
        (runs["unfinished"]/"step-0000000006.pt").unlink(missing_ok=True)
        newest = max(runs["unfinished"].glob("step-*.pt"))
        newest.unlink()                          # one epoch is left to train
        (runs["unfinished"]/"best.pt").unlink()
        best = runs["unfinished"]/"best.pt"
        shutil.copy(max(runs["unfinished"].glob("step-*.pt")), best)
        whole = bytes_of(runs["finished"])
        expected = {"evaluate": numbers(called(bt_evaluate, str(runs["finished"]), str(images), workers=0)[1])}
        assert called(bt_export, str(runs["finished"]))[0] == 0
        expected["export"] = weights_in(runs["finished"]/"encoder_timm.safetensors")
        for f in ("encoder_timm.safetensors", "encoder_timm.py"): (runs["finished"]/f).unlink()
        (runs["finished"]/"evaluation.json").unlink()
        total, start = defaultdict(Counter), time.time()
        for kind, commands in (("unfinished", ("resume",)), ("finished", ("resume", "evaluate", "export"))):
            for name, way in cases(runs[kind], a.only):
                if kind == "finished" and name.endswith(".pt"): commands_of = ("resume",)
                else: commands_of = commands
                result = tried(runs[kind], name, way, images, runs["other"], whole, expected, tmp, commands_of)
                for command, (verdict, text) in result.items():
                    total[kind, name, command][verdict] += 1
                    if verdict not in ("one line", "right") or a.show:
                        print(f"{verdict}: {kind} {command}, {name} {way}\n{text[-1500:]}", flush=True)
        print(f"{'run':11} {'file':22} {'command':9} {'one line':>8} {'right':>8}  else ({time.time() - start:.0f} s)")
        for (kind, name, command), n in total.items():
            rest = {k: v for k, v in n.items() if k not in ("one line", "right")}
            print(f"{kind:11} {name:22} {command:9} {n['one line']:8} {n['right']:8}  {rest or ''}")
        all_of = sum(total.values(), Counter())
    print(dict(all_of))
    sys.exit(set(all_of) - {"one line", "right"} != set())


if __name__ == "__main__": main()
