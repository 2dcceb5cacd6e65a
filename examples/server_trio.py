"""A key server inside a trio program, beside the program's own work; chutes_proto_asyncio does the same on asyncio.

python examples/server_trio.py server.toml
"""

import sys

import trio

import chutes_proto_trio
from chutes_proto.server import ServerConfig


async def main(config):
    async with trio.open_nursery() as nursery:
        urls = await nursery.start(serve, config)
        await own_work(urls)
        nursery.cancel_scope.cancel()


async def serve(config, task_status):
    await chutes_proto_trio.serve(config, ready=task_status.started)


async def own_work(urls):
    """Stands for the program's own work; it ends with the next line on standard input."""
    print(*urls, sep="\n", flush=True)
    await trio.to_thread.run_sync(sys.stdin.readline)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} CONFIGURATION")
    trio.run(main, ServerConfig.load(sys.argv[1]))
