# SPDX-License-Identifier: MIT
"""A model hub on loopback that speaks as much of ModelScope's and Hugging Face's
protocols as their real client libraries need to download a model."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, urlsplit

COMMIT = "c" * 40


@dataclass
class Hub:
    """Both hubs at once, serving `files` under any of the `repos`."""

    repos: tuple[str, ...] = ("LLM-Research/phi-4", "microsoft/phi-4")
    files: dict[str, bytes] = field(default_factory=dict)
    pages: dict[str, bytes] = field(default_factory=dict)
    """Anything else to serve, by path."""
    listed_sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the listing gives instead of the true ones."""
    listed_content: dict[str, bytes] = field(default_factory=dict)
    """Contents whose hashes the listing gives instead of the true ones."""
    listed_fields: dict[str, dict[str, object]] = field(default_factory=dict)
    """Fields of a file's entry in the listing, instead of or beside its own."""
    listing_body: bytes | None = None
    """What is sent instead of a listing."""
    listing_status: int = 200
    commit: object = COMMIT
    """What Hugging Face's listing gives as its commit."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of every answer, beside its own."""
    drop_once: dict[str, int] = field(default_factory=dict)
    """Close the connection, the first time, after so many bytes of a file."""
    stall: dict[str, int] = field(default_factory=dict)
    """Send no more after so many bytes of a file."""
    asked: list[str] = field(default_factory=list)
    """The path of each request."""
    fetched: list[tuple[str, str | None]] = field(default_factory=list)
    """What was downloaded: file name and Range header."""

    def __enter__(self) -> Self:
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def size(self, name: str) -> int:
        return self.listed_sizes.get(name, len(self.files[name]))

    def content(self, name: str) -> bytes:
        return self.listed_content.get(name, self.files[name])

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.content(name)).hexdigest()

    def git_sha1(self, name: str) -> str:
        content = self.content(name)
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub: Hub = self.server.hub
        url = urlsplit(self.path)
        hub.asked.append(url.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        for repo in hub.repos:
            listings = (f"/api/v1/models/{repo}/repo/files", f"/api/models/{repo}")
            if hub.listing_body is not None and url.path in listings:
                return self.send_body(hub.listing_status, hub.listing_body, {})
            if url.path == f"/api/v1/models/{repo}/repo/files":
                return self.send_json({"Data": {"Files": self.modelscope_files()}})
            if url.path == f"/api/v1/models/{repo}/repo":
                return self.send_file(query["FilePath"])
            if url.path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
                files = self.huggingface_siblings()
                answer = {"id": repo, "sha": hub.commit, "siblings": files}
                return self.send_json(answer)
            if url.path.startswith(f"/api/models/{repo}/tree/"):
                return self.send_json(self.huggingface_files())
            if url.path.startswith(f"/{repo}/resolve/"):
                return self.send_file(url.path.split("/", 5)[5])
        if url.path in hub.pages:
            return self.send_body(
                200, hub.pages[url.path], {"Content-Type": "text/html"}
            )
        headers = {"X-Error-Code": "RepoNotFound"}
        return self.send_body(404, b'{"Message": "no such repo"}', headers)

    do_HEAD = do_GET

    def modelscope_files(self) -> list[dict[str, object]]:
        hub: Hub = self.server.hub
        return [
            {
                "Path": name,
                "Type": "blob",
                "Size": hub.size(name),
                "Sha256": hub.sha256(name),
                **hub.listed_fields.get(name, {}),
            }
            for name in hub.files
        ]

    def huggingface_siblings(self) -> list[dict[str, object]]:
        """The large files with their sha256, the others with git's sha1."""
        hub: Hub = self.server.hub
        files = []
        for name in hub.files:
            file = {"rfilename": name, "size": hub.size(name)}
            if name.endswith(".safetensors"):
                file["blobId"] = "0" * 40  # of the pointer that git has instead
                lfs = {"size": hub.size(name), "sha256": hub.sha256(name)}
                file["lfs"] = lfs | {"pointerSize": 135}
            else:
                file["blobId"] = hub.git_sha1(name)
            files.append(file | hub.listed_fields.get(name, {}))
        return files

    def huggingface_files(self) -> list[dict[str, object]]:
        hub: Hub = self.server.hub
        return [
            {"type": "file", "path": name, "size": hub.size(name), "oid": "0" * 40}
            for name in hub.files
        ]

    def send_json(self, value: object) -> None:
        self.send_body(200, json.dumps(value).encode(), {})

    def send_file(self, name: str) -> None:
        hub: Hub = self.server.hub
        content = hub.files[name]
        headers = {"ETag": f'"{hub.sha256(name)}"', "X-Repo-Commit": COMMIT}
        asked = self.headers.get("Range")
        if self.command == "GET":
            hub.fetched.append((name, asked))
        if asked is None:
            return self.send_body(200, content, headers, name)
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        end = len(content) - 1
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self.send_body(206, content[start:], headers, name)

    def send_body(
        self, status: int, body: bytes, headers: dict[str, str], name: str = ""
    ) -> None:
        hub: Hub = self.server.hub
        self.send_response(status)
        for key, value in (headers | hub.headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in hub.drop_once:
            self.wfile.write(body[: hub.drop_once.pop(name)])
            self.close_connection = True
        elif name in hub.stall:
            self.wfile.write(body[: hub.stall[name]])
            hub.closing.wait()
        else:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
