# SPDX-License-Identifier: MIT
"""What test_ray.py runs in a namespace of its own: a Ray cluster, and the way to it.

    python tests/support/ray_inside.py DESCRIPTOR

Connections to the listening socket with this number, which is from outside, are handed
on to Ray's proxies. Shell commands come as lines of standard input; each is run to its
end, which a line of its exit code tells.
"""

import asyncio
import contextlib
import fcntl
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The end of this process ends the first one in there, and that all others.
ISOLATED = ["setpriv", "--pdeathsig", "KILL", "unshare", "--kill-child", "--fork"]
ISOLATED += ["--map-root-user", "--net", "--pid", "--mount-proc"]


def why_not() -> str:
    """Why no namespace can be made here; empty if one can."""
    try:
        done = subprocess.run(
            [*ISOLATED, "true"], check=False, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "setpriv and unshare (util-linux) are not installed"
    return "" if done.returncode == 0 else f"no namespaces here: {done.stderr.strip()}"


def loopback_up() -> None:
    """Switch the only network device of a new namespace on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.pack("16sh22x", b"lo", 1)  # IFF_UP
        fcntl.ioctl(control, 0x8914, flags)  # SIOCSIFFLAGS


def save_cluster(folder: Path) -> Path:
    """Write what README.md says to save as cluster.py, alone in its folder."""
    blocks = r"^```python\n(# cluster\.py\n.*?)^```$"
    readme = (ROOT / "README.md").read_text()
    (text,) = re.findall(blocks, readme, re.MULTILINE | re.DOTALL)
    path = folder / "program" / "cluster.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def environment(folder: Path) -> dict[str, str]:
    """For Ray's commands: its files in `folder`, cluster.py for `import`, no report of
    use, this Python."""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    own = {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    own["PYTHONPATH"] = str(save_cluster(folder).parent)
    own |= {"PATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return os.environ | own


async def hand_on(listener: socket.socket) -> None:
    """Pass connections on; the end of either side ends the other."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            served = await asyncio.open_connection("127.0.0.1", 8000)
        except ConnectionError:
            return writer.close()
        await asyncio.gather(copy(reader, served[1]), copy(served[0], writer))

    server = await asyncio.start_server(connected, sock=listener)
    await server.serve_forever()


def main() -> None:
    loopback_up()
    listener = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=asyncio.run, args=[hand_on(listener)], daemon=True).start()
    for command in sys.stdin:
        done = subprocess.run(["bash", "-c", command], check=False, stdout=sys.stderr)
        print(done.returncode, flush=True)


if __name__ == "__main__":
    main()
