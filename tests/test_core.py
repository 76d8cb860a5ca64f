"Files written completely or not at all, and models out of their wrappers"
import json
import os
import stat
import subprocess
import sys
import tempfile

import pytest
import torch
from torch import nn

from self_supervised_bt.core import (
    in_percent,
    lock_folder,
    remove_unfinished,
    unlock,
    unwrapped,
    whole_file,
    write_json,
)


def names(folder): return sorted(f.name for f in folder.iterdir())


def write(file, text, error=None):
    with whole_file(file) as part:
        part.write_text(text)
        if error: raise error


class SafetensorError(Exception): "Of the name of safetensors' own"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed"),
                                   SafetensorError("StorageFull")])
def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path, error):
    file = tmp_path/"a.txt"
    write(file, "old")
    with pytest.raises(OSError, match=r"a.txt could not be written \((No space|file write|Storage).*Nothing was lost"):
        write(file, "new", error)
    assert file.read_text() == "old" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no error of the disk")])
def test_other_exceptions_pass_and_leave_nothing(tmp_path, error):
    with pytest.raises(type(error)): write(tmp_path/"a.txt", "new", error)
    assert names(tmp_path) == []


def test_files_of_the_user_beside_it_stay(tmp_path):
    mine = ["a.txt.part", ".a.txt.tmp", ".a.txt.unfinished", ".a.txt.12345678.unfinished2", "b.txt", ".tmp123456"]
    for name in mine: (tmp_path/name).write_text("mine")
    write(tmp_path/"a.txt", "new")
    assert names(tmp_path) == sorted([*mine, "a.txt"])
    assert all((tmp_path/name).read_text() == "mine" for name in mine)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_mode_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with whole_file(tmp_path/"a.txt") as part:
            part.unlink()
            part.write_text("of a writer that makes files for their owner alone")
            part.chmod(0o600)
    finally: os.umask(before)
    assert stat.S_IMODE((tmp_path/"a.txt").stat().st_mode) == mode


KILLED = """
import os, sys
from self_supervised_bt.core import whole_file
with whole_file(sys.argv[1]) as part:
    part.write_text("half")
    (part.parent/".tmpAb12Cd").write_text("of the writer itself")
    if len(sys.argv) > 2: print("writing", flush=True), sys.stdin.read()
    os.kill(os.getpid(), 9)
"""


def test_what_a_kill_inside_a_write_left_is_removed_by_the_next_one(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path/"a.txt", "wait"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "writing\n"
    write(tmp_path/"a.txt", "mine")
    assert len(names(tmp_path)) == 2, "the other process is still writing"
    child.communicate("")
    assert len(names(tmp_path)) == 2 and (tmp_path/"a.txt").read_text() == "mine"
    remove_unfinished(tmp_path, "b.*")
    assert len(names(tmp_path)) == 2, "of another file"
    write(tmp_path/"a.txt", "again")
    assert names(tmp_path) == ["a.txt"]


def test_a_link_is_followed_and_what_is_no_file_is_not_replaced(tmp_path):
    write(tmp_path/"a.txt", "old")
    (tmp_path/"link").symlink_to(tmp_path/"a.txt")
    write(tmp_path/"link", "new")
    assert (tmp_path/"link").is_symlink() and (tmp_path/"a.txt").read_text() == "new"
    os.mkfifo(tmp_path/"pipe")
    with pytest.raises(OSError, match="it exists and is no file"): write(tmp_path/"pipe", "new")
    assert stat.S_ISFIFO((tmp_path/"pipe").stat().st_mode)


def test_values_that_json_cannot_hold_leave_the_old_file(tmp_path):
    write_json(tmp_path/"run.json", dict(a=1))
    with pytest.raises(TypeError): write_json(tmp_path/"run.json", dict(a={1, 2}))
    assert json.loads((tmp_path/"run.json").read_text()) == dict(a=1)


def test_a_model_comes_out_of_its_wrappers():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(1, 1)   # a name, no wrapper
    net = Module()
    for wrapped in (net, torch.compile(net), nn.DataParallel(net), torch.compile(nn.DataParallel(net)),
                    nn.DataParallel(torch.compile(net))):
        assert unwrapped(wrapped) is net


@pytest.mark.parametrize("share, decimals, text", [(.9715, 1, "97.2 %"), (1, 0, "100 %"), (0, 1, "0.0 %"),
                                                   (torch.tensor(.5), 2, "50.00 %")])
def test_shares_are_in_percent(share, decimals, text): assert in_percent(share, decimals) == text


@pytest.mark.skipif(os.name != "posix", reason="needs locks")
@pytest.mark.parametrize("held", [False, True])
def test_a_new_folder_that_another_process_removes_before_it_is_locked(tmp_path, monkeypatch, held):
    real, made, locks = tempfile.mkdtemp, [], []

    def mkdtemp(*args, **kwargs):
        made.append(real(*args, **kwargs))
        if len(made) == 1 and held: locks.append(lock_folder(made[0]))   # the other process is about to remove it
        elif len(made) == 1: remove_unfinished(tmp_path, "a.txt")
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with whole_file(tmp_path/"a.txt") as part: part.write_text("whole")
    for lock in locks: unlock(lock)
    assert len(made) == 2 and (tmp_path/"a.txt").read_text() == "whole" and not os.path.exists(made[1])
