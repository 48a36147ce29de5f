"""This machine's own public addresses, tried from inside it: a network namespace has some, and a server behind each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

INSIDE = """
import http.server, io, json, sys, threading
from PIL import Image
from data_pipeline.gateway import addresses
from data_pipeline.gateway.proxy import Policy, fetch

stream = io.BytesIO()
Image.new("RGB", (30, 20), "teal").save(stream, "png")

class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(stream.getvalue())))
        self.end_headers()
        self.wfile.write(stream.getvalue())
    def log_message(self, *words): pass

class Server(http.server.ThreadingHTTPServer):
    def server_bind(self):
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "here", self.socket.getsockname()[1]

asked = []
servers = {"4": Server(("0.0.0.0", 0), Page)}
Server.address_family = 10
servers["6"] = Server(("::", 0), Page)
for server in servers.values():
    threading.Thread(target=server.serve_forever, daemon=True).start()

def outcome(host):
    port = servers["6" if ":" in host else "4"].server_port
    return getattr(fetch(f"http://{host}:{port}/x", Policy(timeout_s=2, deadline_s=4, retries=0)), "reason", "fetched")

hosts = sys.argv[1:]
refused = {host: outcome(host) for host in hosts}
before = len(asked)
addresses.is_own = lambda address: False
print(json.dumps({"refused": refused, "asked": before, "open": {host: outcome(host) for host in hosts}}))
"""
OWN = {  # address -> how it becomes ours
    "93.184.215.14": "ip addr add 93.184.215.14/24 dev lo",
    "93.184.215.15": "ip addr add 93.184.215.15/24 dev lo",  # a second one: the kernel speaks to it from the first
    "198.41.0.4": "ip route add local 198.41.0.0/24 dev lo",  # a whole network, listed by no interface
    "[2606:2800::14]": "ip addr add 2606:2800::14/64 dev lo nodad",
    "[::ffff:93.184.215.14]": "true",
}


def namespaces() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    command = ["unshare", "--user", "--map-root-user", "--net", "ip", "link", "set", "lo", "up"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not namespaces(), reason="no network namespaces for this user")
def test_no_own_public_address_is_connected_to_and_each_would_have_answered():
    setup = "; ".join(["set -e", "ip link set lo up", *OWN.values(), 'exec "$@"'])
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", setup, "sh", sys.executable, "-c", INSIDE, *OWN],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["refused"] == dict.fromkeys(OWN, "own address") and found["asked"] == 0
    mapped = "[::ffff:93.184.215.14]"  # leads to the server of IPv6, which takes both
    assert found["open"] == dict.fromkeys(OWN, "fetched"), f"the control: {mapped} and the others answer"
