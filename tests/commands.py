"""Console commands, each in a child process of its own, without the seconds that a new process takes to import PyTorch.

`with commands(folder):` starts one process that imports what commands need, and writes a program per command into the
folder. Such a program passes its arguments, its working directory and its terminal to that process, which forks a child
that runs the command, and ends with the child's exit status. A program that is killed does not end its child.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager

LOST = 99   # the exit status of a program that the process could not serve
CLIENT = """#!{python} -IS
import json, os, socket, sys
status = {lost}
try:
    with socket.socket(socket.AF_UNIX) as s:
        s.connect({path!r})
        socket.send_fds(s, [b"."], [1, 2])
        s.sendall(json.dumps([{name!r}, os.getcwd(), sys.argv[1:]]).encode())
        s.shutdown(socket.SHUT_WR)
        status = int(s.recv(4) or status)
finally: os._exit(status)
"""


@contextmanager
def commands(folder):
    "Inside, the folder holds a program per command, all served by one process; its standard output is not read"
    from self_supervised_bt import cli
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}   # a child of a process with threads could block
    with tempfile.TemporaryDirectory() as short:   # the path of a socket may have 100 characters
        path = f"{short}/socket"
        for name in cli.__all__:
            (folder/name).write_text(CLIENT.format(python=sys.executable, path=path, name=name, lost=LOST))
            (folder/name).chmod(0o755)
        command = [sys.executable, "-W", "ignore", __file__, path]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout.readline() == b"ready\n"
                yield folder
            finally: server.terminate()


def serve(path):
    "Fork a child for every program that connects, one after the other"
    import matplotlib
    matplotlib.use("Agg")
    from self_supervised_bt import all, doctor, experiments, runs  # noqa: F401
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print("ready", flush=True)
        while True:
            client, _ = listening.accept()
            with client: answer(client)


def answer(client):
    "Run one command in a child, and send its exit status"
    _, terminal, _, _ = socket.recv_fds(client, 1, 2)
    name, folder, args = json.loads(b"".join(iter(lambda: client.recv(4096), b"")))
    pid = os.fork()
    if not pid: child(folder, [name, *args], terminal)
    for fd in terminal: os.close(fd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    client.sendall(b"%d" % (status if status >= 0 else 128 - status))   # a signal as a shell gives it


def child(folder, line, terminal):
    "The command, as a console script calls it: at the top of a file that is run; never returns"
    status = 1
    try:
        for fd, given in zip((1, 2), terminal): os.dup2(given, fd)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(folder)
        sys.argv = line
        script = f"from self_supervised_bt.cli import {line[0]}\n{line[0]}()"
        exec(compile(script, line[0], "exec"), {"__name__": "__main__", "__file__": line[0]})
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__": serve(sys.argv[1])
