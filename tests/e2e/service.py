"""An ordinary service behind the edge: what a team has beside its LLM."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from harness import free_port


class Service:
    """`/json`, `/headers`, `/upload`, `/late`, and `/stream`, whose lines the test lets out one by one."""

    def __init__(self) -> None:
        service = self
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # Permits for the lines of /stream.
        self.lines = threading.Semaphore(0)
        # When /late answers.
        self.late = threading.Event()
        # Set when /stream finds that nobody reads any more.
        self.reader_left = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self, body: dict, status: int = 200) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.send_header("x-service", "yes")
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path.endswith("/json"):
                    self.answer({"path": self.path, "method": self.command})
                elif path.endswith("/headers"):
                    self.answer({name.lower(): value for name, value in self.headers.items()})
                elif path.endswith("/teapot"):
                    self.answer({"short": "stout"}, 418)
                elif path.endswith("/late"):
                    service.late.wait()
                    self.answer({"late": True})
                elif path.endswith("/stream"):
                    self.stream()
                else:
                    self.answer({"path": self.path}, 404)

            def stream(self) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                try:
                    for n in range(10_000):
                        service.lines.acquire()
                        data = f"data: line {n}\n\n".encode()
                        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                        self.wfile.flush()
                except OSError:
                    service.reader_left.set()
                    self.close_connection = True

            def do_POST(self) -> None:
                digest, size = hashlib.sha256(), 0
                for part in self.body():
                    digest.update(part)
                    size += len(part)
                self.answer({"path": self.path, "bytes": size, "sha256": digest.hexdigest()})

            do_PUT = do_POST

            def body(self):
                if "chunked" in self.headers.get("transfer-encoding", ""):
                    while size := int(self.rfile.readline(), 16):
                        yield self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return
                left = int(self.headers.get("content-length", 0))
                while left:
                    part = self.rfile.read(min(left, 65536))
                    left -= len(part)
                    yield part

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.lines.release(100_000)
        self.late.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
