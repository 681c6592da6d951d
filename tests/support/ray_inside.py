# SPDX-License-Identifier: MIT
"""What test_ray.py runs in a namespace of its own: a Ray cluster, and the way to it.

    python tests/ray_inside.py DESCRIPTOR

Connections to the listening socket with this number, which is from outside, are handed
on to Ray's proxies. Shell commands come as lines of standard input; each is run to its
end, which a line of its exit code tells.
"""

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading

import ray_cluster


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
    ray_cluster.loopback_up()
    listener = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=asyncio.run, args=[hand_on(listener)], daemon=True).start()
    for command in sys.stdin:
        done = subprocess.run(["bash", "-c", command], check=False, stdout=sys.stderr)
        print(done.returncode, flush=True)


if __name__ == "__main__":
    main()
