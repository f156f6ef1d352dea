# SPDX-License-Identifier: Apache-2.0
"""NVMe controllers without a drive: SPDK's own target, its disks in memory or on files.

with EmulatedTarget(memory_mib=1024) as emulated:
    emulated.malloc("m0", 1 << 30)
    target = emulated.export("m0")  # "trtype:VFIOUSER traddr:/tmp/..."
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dualblade.errors import TargetError, UsageError
from dualblade.host.meminfo import machine_memory
from dualblade.host.sysfs import Host
from dualblade.nvmf_process import Folder, death, end, find_program, start
from dualblade.units import MIB, format_size, round_up

if TYPE_CHECKING:
    from spdk.rpc.client import JSONRPCClient

BLOCK = 4096
TRANSPORTS = {"vfio-user": "VFIOUSER", "tcp": "TCP"}
_OWN_MIB = 256  # buffer pools, queues and what it never touches
_HUGEPAGE = 2 * MIB
_HUGEPAGE_POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
_LARGEST_IN_HUGEPAGES_MIB = 15 << 10  # DPDK lists 8192 pages of 2 MiB in one piece
_START_S, _RPC_S = 30.0, 600.0  # a disk in memory is zeroed within one call
_PORT_TRIES = 5

Hugepages = bool | Literal["auto"]


class EmulatedTarget:
    """nvmf_tgt, ended with `with` or by close(), and by the kernel when the thread that started it ends.

    Its reactor keeps one CPU busy all the time. Not for use by two threads at once. What fails raises
    TargetError.
    """

    def __init__(
        self,
        *,
        memory_mib: int = 256,
        hugepages: Hugepages = "auto",
        cpu: int | None = None,
        program: Path | None = None,
    ):
        """memory_mib: what its disks in memory take together; its own share is added. hugepages: "auto"
        takes them where enough are free. cpu: the one it keeps busy; None: the last that this process
        may use. program: nvmf_tgt; None: looked for."""
        self.memory_mib = memory_mib + _OWN_MIB
        self.cpu = max(os.sched_getaffinity(0)) if cpu is None else cpu
        self.program = find_program(program)
        self.hugepages = hugepages_wanted(hugepages, self.memory_mib)
        self._folder: Folder | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._rpc: JSONRPCClient | None = None
        self._done: list[tuple[str, dict[str, Any]]] = []  # what restart() does again
        self._transports: set[str] = set()
        self._subsystems: dict[str, str] = {}  # bdev -> NQN
        self._listeners = 0

    # open and close ---------------------------------------------------------------------------

    def open(self) -> EmulatedTarget:
        """Start it. After an error nothing is left."""
        try:
            self._folder = Folder()
            self._launch()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End it and remove what it had, whatever state it is in. A second call does nothing."""
        self._disconnect()
        if self._process is not None:
            end(self._process)
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def __enter__(self) -> EmulatedTarget:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        alive = self._process is not None and self._process.poll() is None
        return f"<EmulatedTarget {f'pid {self.pid}' if alive else 'not running'}>"

    # disks --------------------------------------------------------------------------------------

    def malloc(self, name: str, size: int, block_size: int = BLOCK) -> str:
        """A disk of zeros in memory, `size` bytes. Returns its name, as all of these do."""
        return self._bdev("bdev_malloc_create", name, num_blocks=size // block_size, block_size=block_size)

    def uring(self, name: str, path: Path | str, block_size: int = BLOCK) -> str:
        """A disk on a file that exists, through io_uring and past the page cache."""
        return self._bdev("bdev_uring_create", name, filename=str(path), block_size=block_size)

    def aio(self, name: str, path: Path | str, block_size: int = BLOCK) -> str:
        """The same through Linux AIO, where io_uring is forbidden or not built in."""
        return self._bdev("bdev_aio_create", name, filename=str(path), block_size=block_size)

    def file(self, name: str, path: Path | str, block_size: int = BLOCK) -> str:
        """uring() where it works, else aio()."""
        try:
            return self.uring(name, path, block_size)
        except TargetError as refusal:
            try:
                return self.aio(name, path, block_size)
            except TargetError as error:
                raise TargetError(f"{path} cannot be used: {refusal}; {error}", error.hint) from error

    def delay(self, name: str, base: str, latency_us: int) -> str:
        """`base` with that much added to every read and write."""
        kinds = ("avg_read_latency", "p99_read_latency", "avg_write_latency", "p99_write_latency")
        return self._bdev("bdev_delay_create", name, base_bdev_name=base, **dict.fromkeys(kinds, latency_us))

    def error(self, base: str) -> str:
        """`base` as the disk EE_`base`, which fails as rpc.bdev_error_inject_error() tells it to."""
        self.call("bdev_error_create", base_name=base)
        return f"EE_{base}"

    def _bdev(self, method: str, name: str, **parameters: Any) -> str:
        self.call(method, name=name, **parameters)
        return name

    # export -------------------------------------------------------------------------------------

    def export(self, bdev: str, transport: str = "vfio-user") -> str:
        """A TARGET for `bdev`, namespace 1 of its own subsystem. transport: a key of TRANSPORTS.

        Again for the same disk: one more way in. A vfio-user one takes one client at a time.
        """
        if transport not in TRANSPORTS:
            raise UsageError(f"{transport!r} is none of {', '.join(TRANSPORTS)}")
        self._add_transport(TRANSPORTS[transport])
        nqn = self._subsystem(bdev)
        listen = self._listen_vfio_user if transport == "vfio-user" else self._listen_tcp
        address = listen(nqn)
        words = [f"{key}:{value}" for key, value in address.items()]
        return " ".join([*words, f"subnqn:{nqn}"])

    def _add_transport(self, trtype: str) -> None:
        if trtype in self._transports:
            return
        try:
            self.call("nvmf_create_transport", trtype=trtype)
        except TargetError as error:
            hint = "SPDK is built without it where --with-vfio-user was left out; tcp is always there"
            raise TargetError(error.message, hint if trtype == "VFIOUSER" else None) from error
        self._transports.add(trtype)

    def _subsystem(self, bdev: str) -> str:
        if bdev not in self._subsystems:
            nqn = f"nqn.2016-06.io.spdk:dualblade-{bdev}"
            names = {"serial_number": f"EMULATED-{bdev}"[:20], "model_number": "dualblade-spdk emulated"}
            self.call("nvmf_create_subsystem", nqn=nqn, allow_any_host=True, **names)
            self.call("nvmf_subsystem_add_ns", nqn=nqn, namespace={"bdev_name": bdev, "nsid": 1})
            self._subsystems[bdev] = nqn
        return self._subsystems[bdev]

    def _listen_vfio_user(self, nqn: str) -> dict[str, str]:
        folder = self.folder / f"c{self._listeners}"
        folder.mkdir()
        self._listeners += 1
        address = {"trtype": "VFIOUSER", "traddr": str(folder)}
        self.call("nvmf_subsystem_add_listener", nqn=nqn, listen_address={**address, "trsvcid": "0"})
        return address

    def _listen_tcp(self, nqn: str) -> dict[str, str]:
        """On a port of this machine alone that nobody has; somebody may take it first, hence tries."""
        for left in reversed(range(_PORT_TRIES)):
            address = {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": str(_free_port())}
            try:
                self.call("nvmf_subsystem_add_listener", nqn=nqn, listen_address=address)
                break
            except TargetError:
                if not left:
                    raise
        return address

    # life ---------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was never started"
        return self._process.pid

    @property
    def folder(self) -> Path:
        """Its sockets and its log."""
        assert self._folder is not None, "it is not open"
        return self._folder.path

    @property
    def rpc(self) -> JSONRPCClient:
        """The JSON-RPC client itself: rpc.bdev_get_bdevs() and so on. Raises its JSONRPCException."""
        assert self._rpc is not None, "it does not run"
        return self._rpc

    def call(self, method: str, **parameters: Any) -> Any:
        """One JSON-RPC call that restart() repeats."""
        result = self._ask(method, parameters)
        self._done.append((method, parameters))
        return result

    def wait(self, timeout: float | None = None) -> None:
        """For it to end by itself, which is an error: raises TargetError. timeout: seconds."""
        assert self._process is not None, "it was never started"
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return
        raise death(self._process, self.folder)

    def kill(self) -> None:
        """As if it crashed. The folder stays until close()."""
        self._disconnect()
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        """SIGSTOP: it answers nothing until cont()."""
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """The same disks under the same TARGETs in a new process; a disk in memory is all zeros again."""
        self._disconnect()
        if self._process is not None:
            end(self._process)
        for socket_file in self.folder.glob("c*/*"):  # a listener wants its folder empty
            socket_file.unlink()
        self._launch()
        for method, parameters in self._done:
            self._ask(method, parameters)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    # start --------------------------------------------------------------------------------------

    def _launch(self) -> None:
        for leftover in self.folder.glob("rpc.sock*"):
            leftover.unlink()
        arguments = target_arguments(self.folder / "rpc.sock", self.cpu, self.memory_mib, self.hugepages)
        self._process = start(self.program, arguments, self.folder)
        self._rpc = self._connect(self._process)
        self._ask("iobuf_set_options", {"small_pool_count": 1024, "large_pool_count": 128})
        # Whatever the disks hold, a partition table for instance, is none of the target's business.
        self._ask("bdev_set_options", {"bdev_auto_examine": False})
        self._ask("framework_start_init", {})

    def _connect(self, process: subprocess.Popen[bytes]) -> JSONRPCClient:
        path = self.folder / "rpc.sock"
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise death(process, self.folder)
            if path.exists() and (client := _client(path)):
                return client
            time.sleep(0.01)
        raise TargetError(f"nvmf_tgt has not answered for {_START_S:.0f} s")

    def _disconnect(self) -> None:
        if self._rpc is not None:
            client, self._rpc = self._rpc, None
            _quietly(client.close)

    def _ask(self, method: str, parameters: dict[str, Any]) -> Any:
        from spdk.rpc.client import JSONRPCException

        process = self._process
        assert process is not None, "it was never started"
        if process.poll() is not None:
            raise death(process, self.folder)
        try:
            return self.rpc.call(method, dict(parameters))
        except (JSONRPCException, OSError, AttributeError) as error:  # the last: it has no socket any more
            try:
                process.wait(0.2)  # the connection ends an instant before the process
            except subprocess.TimeoutExpired:
                raise TargetError(f"nvmf_tgt refuses {method}: {_reason(error)}") from error
            raise death(process, self.folder) from error


# parts ------------------------------------------------------------------------------------------


def target_arguments(rpc: Path, cpu: int, memory_mib: int, hugepages: bool) -> list[str]:
    """nvmf_tgt's command line: no PCI, no default paths, no files outside the folder of `rpc`."""
    memory = ["--single-file-segments", "--iova-mode", "va", "--env-context=--in-memory"]
    return [
        "--rpc-socket", str(rpc), "--wait-for-rpc",
        "--lcores", f"0@{cpu}", "--disable-cpumask-locks", "--no-pci",
        "--mem-size", str(memory_mib), *(memory if hugepages else ["--no-huge"]),
        "--msg-mempool-size", "8191", "--num-trace-entries", "0", "--limit-coredump",
    ]  # fmt: skip


def hugepages_wanted(asked: Hugepages, memory_mib: int, host: Host = Host()) -> bool:
    """Whether hugepages are used. Raises TargetError where the memory is not there."""
    free = free_hugepages(host)
    enough = round_up(memory_mib * MIB, _HUGEPAGE) // _HUGEPAGE <= free
    if asked == "auto":
        asked = enough and memory_mib <= _LARGEST_IN_HUGEPAGES_MIB
    size = format_size(memory_mib * MIB)
    if asked and not enough:
        raise TargetError(
            f"nvmf_tgt wants {size} of hugepages, and {free} of 2 MiB are free", "do without: --no-hugepages"
        )
    available = machine_memory(host).available
    if not asked and memory_mib * MIB > available:
        raise TargetError(
            f"nvmf_tgt wants {size} of memory, and {format_size(available)} are available",
            "ask for less, or keep the disk on a file: --file PATH",
        )
    return asked


def free_hugepages(host: Host = Host()) -> int:
    """Of 2 MiB, that nobody has or was promised."""
    try:
        counts = [host.read_int(f"{_HUGEPAGE_POOL}/{name}_hugepages") for name in ("free", "resv")]
    except (OSError, ValueError):
        return 0
    return counts[0] - counts[1]


def _client(path: Path) -> JSONRPCClient | None:
    """None while it does not listen yet."""
    from spdk.rpc.client import JSONRPCClient, JSONRPCException

    try:
        return JSONRPCClient(str(path), timeout=_RPC_S)
    except JSONRPCException:
        return None
    finally:
        logging.getLogger(f"JSONRPCClient({path})").handlers.clear()  # it adds one each time


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _quietly(close: Callable[[], None]) -> None:
    try:
        close()
    except OSError:
        return  # the other side went first


def _reason(error: Exception) -> str:
    """The target's own words, out of the client's several lines."""
    text = str(getattr(error, "message", error))
    _, _, answer = text.partition("response:\n")
    try:
        return str(json.loads(answer)["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())
