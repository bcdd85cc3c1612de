"""python, already warm: a server that has imported what train.py does forks a child for every command.

`[*python(), "train.py", ...]` runs what `[sys.executable, "train.py", ...]` does, and so for -m and -c, without the
seconds that importing torch and transformers takes. What is started is a client: its files, folder, environment and
arguments go to the server, whose child runs the command with them; a signal to the client reaches the child, so does
its death, and the client ends as the child does. The server has imported, but computed nothing, and has no threads.

Not for what depends on how Python starts: variables that an import reads, another copy of the tree, the seed of hashes.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = """
    train engine.evaluate engine.generate kernels.chunked kernels.eager matplotlib.figure
    torch.distributed.run transformers.processing_utils transformers.models.qwen2.modeling_qwen2
""".split()
READ_BY_IMPORTS = ("OMP_NUM_THREADS", "TRITON_INTERPRET", "ATEN_CPU_CAPABILITY")
RELAYED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LARGEST = 1 << 17  # bytes of a message


@functools.cache
def python() -> list[str]:
    """What to begin a command with, for `python`; its server ends with this process. It is a cold Python beside a GPU,
    which a forked child may not share, and where the kernel cannot wait for a process among others."""
    import torch

    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return [sys.executable]
    if torch.cuda.is_available():
        return [sys.executable]
    folder = tempfile.TemporaryDirectory()
    place = f"{folder.name}/warm"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(place)
        listener.listen(64)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(listener.fileno())],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            pass_fds=[listener.fileno()],
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
    atexit.register(lambda: (server.stdin.close(), server.wait(), folder.cleanup()))
    return [sys.executable, "-SE", __file__, place]


def command(*argv, ranks: int = 0, cold: bool = False, meet: tuple = ("--standalone",)) -> list[str]:
    """`python ARGV`, or `torchrun MEET --nproc_per_node=RANKS ARGV`; cold: as a user starts it."""
    launcher = ["-m", "torch.distributed.run", *meet, f"--nproc_per_node={ranks}"]
    start, rank = ([sys.executable], []) if cold else (python(), ["--no-python", *python(), "-u"])
    return [*start, *([*launcher, *rank] if ranks else []), *map(str, argv)]


def ask(place: str, argv: list[str]) -> int:
    """The client: the exit code of the command; does not return where a signal ended that."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(place)
        socket.send_fds(server, [json.dumps([argv, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
        child = int(server.recv(LARGEST))
        arrived, written = socket.socketpair()  # a Python handler would wait for a recv that has just begun
        written.setblocking(False)
        signal.set_wakeup_fd(written.fileno())
        for number in RELAYED:
            signal.signal(number, lambda number, _: None)
        while server not in select.select([server, arrived], [], [])[0]:
            for number in arrived.recv(64):
                kill(child, number)
        code = int(server.recv(LARGEST))
    if code < 0:
        if -code in RELAYED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Server:
    """Forks a child for every client and tells the client how it ended."""

    def __init__(self, listener: socket.socket):
        self.listener = listener
        self.children = {}  # descriptor that is readable once the child has ended: (its pid, connection to its client)

    def serve(self) -> tuple[bytes, list[int]]:
        """Returns in a child only, with the message and the files of its client. Ends when stdin does."""
        while True:
            clients = {client: pid for pid, client in self.children.values()}
            ready = select.select([0, self.listener, *self.children, *clients], [], [])[0]
            for client in clients.keys() & ready:  # it is gone
                os.kill(clients[client], signal.SIGKILL)
            for ended in self.children.keys() & ready:
                self.reap(ended)
            if 0 in ready:
                for pid, _ in self.children.values():
                    os.kill(pid, signal.SIGKILL)
                sys.exit()
            if self.listener in ready and (asked := self.accept()):
                return asked

    def accept(self) -> tuple[bytes, list[int]] | None:
        client, _ = self.listener.accept()
        message, files, _, _ = socket.recv_fds(client, LARGEST, 3)
        pid = os.fork()
        if not pid:
            self.forget(client)
            return message, files
        self.children[os.pidfd_open(pid)] = pid, client
        self.tell(client, pid)
        for file in files:
            os.close(file)

    def reap(self, ended: int) -> None:
        pid, client = self.children.pop(ended)
        self.tell(client, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        client.close()
        os.close(ended)

    def tell(self, client: socket.socket, number: int) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.send(str(number).encode())

    def forget(self, client: socket.socket) -> None:
        """In a child: nobody's connection is held open by it."""
        for descriptor, (_, other) in self.children.items():
            os.close(descriptor)
            other.close()
        self.listener.close()
        client.close()


def become(message: bytes, files: list[int]) -> None:
    """Runs the client's command as Python does that is started with it."""
    argv, folder, environment = json.loads(message)
    differ = [name for name in READ_BY_IMPORTS if os.environ.get(name) != environment.get(name)]
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    assert not differ, f"{differ} is not what the imports have read: start this one with sys.executable"
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["numpy"].random.seed()  # the one generator that a new Python seeds, and a fork does not
    if argv[0] == "-u":
        argv.pop(0)
        sys.stdout, sys.stderr = (io.TextIOWrapper(open(file, "wb", 0), write_through=True) for file in (1, 2))
    kind = argv.pop(0) if argv[0] in ("-c", "-m") else ""
    sys.argv = argv
    sys.path[0] = folder if kind else str(Path(argv[0]).resolve().parent)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if kind == "-c":
        code, argv[0] = argv[0], "-c"
        exec(code, {"__name__": "__main__"})
    elif kind == "-m":
        sys.modules.pop(argv[0], None)
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def main(argument: str, *argv: str) -> None:
    if argv:
        sys.exit(ask(argument, list(argv)))
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would write on the pages it shares
    assert len(os.listdir("/proc/self/task")) == 1, "a fork keeps the calling thread only"
    become(*Server(socket.socket(fileno=int(argument))).serve())


if __name__ == "__main__":
    main(*sys.argv[1:])
