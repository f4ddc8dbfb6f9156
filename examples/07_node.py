"""A node receives for the engines of its host: `python examples/07_node.py`.

What `kvstore serve` does as a process of its own (docs/operations.md) is `kvstore.cluster.Node` in Python. Another
machine is a store of this process here; only the address would differ. The model is a small one with made-up values.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from urllib.request import urlopen

import kvstore
from kvstore.cluster import AttachConfig, HttpConfig, Node, NodeConfig
from kvstore.errors import PeerClosingError
from kvstore.spec import save_spec
from kvstore.testing.specs import check_lease, hybrid, put_all

TOKEN_IDS = list(range(40))
DEADLINE_S = 30.0

with tempfile.TemporaryDirectory() as folder:
    spec_file, socket = Path(folder, "model.json"), Path(folder, "pool.sock")
    save_spec(hybrid(), spec_file)  # `kvstore spec` makes one from a model's configuration
    config = NodeConfig(
        spec=str(spec_file),
        dram=8 << 20,
        listen=("tcp://127.0.0.1:0",),
        attach=AttachConfig(socket=str(socket)),
        http=HttpConfig("127.0.0.1:0"),
    )
    with Node(config) as node, kvstore.open(hybrid(), dram="8MiB") as elsewhere:
        ready = urlopen(f"{node.http_address}/readyz", timeout=DEADLINE_S).read().decode().strip()
        print(f"{ready} at {node.addresses[0]}")

        with elsewhere.write(TOKEN_IDS) as writer:
            put_all(writer)
            writer.commit()
        match = elsewhere.match([*TOKEN_IDS, 40])
        elsewhere.send(match, node.addresses[0]).result(DEADLINE_S)

        with kvstore.attach(socket) as engine, engine.read(engine.match([*TOKEN_IDS, 40])) as lease:
            check_lease(lease, engine.prompt(TOKEN_IDS))
            print(f"an engine of the host reads {lease.tokens} tokens")

        assert node.drain()
        try:
            elsewhere.send(match, node.addresses[0]).result(DEADLINE_S)
        except PeerClosingError as error:
            print(f"draining: {type(error).__name__}: {error}")
