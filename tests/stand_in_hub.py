"""A model hub on loopback, as far as huggingface_hub asks: files in parts, faults on demand, uploads."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c" * 40
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")

ABOUT = re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+(?P<tree>(/.*)?))?")
PATHS = re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)/paths-info/[^/]+")


class Hub:
    """Serves `files` ({"owner/name": {path: bytes}}), and keeps what is uploaded in the same place.

    `faults` holds (method, path) -> list of "slow", "cut" or a status, one for each request until it is empty.
    """

    def __init__(self, files, token="hf_not-a-real-token", gated=()):
        self.files, self.token, self.gated = files, token, gated
        self.faults, self.requests, self.lock = {}, [], threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (Answer,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": len(body), **{name.replace("_", "-"): value for name, value in headers.items()}}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fault(self, path):
        with self.hub.lock:
            self.hub.requests.append((self.command, path, self.headers.get("Range")))
            faults = self.hub.faults.get((self.command, path))
            return faults.pop(0) if faults else None

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        found = FILE.fullmatch(path)
        fault = self.fault(unquote(found["path"]) if found else path)
        if fault == "slow":
            time.sleep(1)
        elif isinstance(fault, int):
            return self.answer(fault)
        if found:
            return self.file(found["repo"], unquote(found["path"]), fault)
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
            return self.answer(200, {"name": "someone", "type": "user", "orgs": []}) if known else self.answer(401)
        if about := ABOUT.fullmatch(path):
            return self.about(about["repo"], about["tree"])
        if "/tree/" in path:
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.answer(200 if path == "/" else 404)

    def file(self, repo, path, fault):
        if repo in self.hub.gated:
            return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message=f"Access to {repo} is restricted.")
        if repo not in self.hub.files:
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Invalid username or password.")
        content = self.hub.files[repo].get(path)
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        part = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start, total = (int(part[1]) if part else 0), len(content)
        if part:
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        content = content[start:]
        if fault != "cut":
            return self.answer(206 if part else 200, content, **headers)
        self.answer(206 if part else 200, content[: len(content) // 2], **headers, Content_Length=len(content))
        self.close_connection = True

    def about(self, repo, tree):
        """A dataset's repository: what is known of it, or where `tree` is given the files below that folder."""
        if repo not in self.hub.files:
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Invalid username or password.")
        files = self.hub.files[repo]
        if tree is None:
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, {"id": repo, "sha": COMMIT, "private": False, "gated": False, "siblings": siblings})
        folder = unquote(tree).strip("/") + "/" if tree.strip("/") else ""
        below = {folder + name[len(folder) :].split("/")[0] for name in files if name.startswith(folder)}
        return self.answer(200, [self.entry(repo, name) for name in sorted(below)])

    def entry(self, repo, name):
        content = self.hub.files[repo].get(name)
        if content is None:
            return {"type": "directory", "path": name, "oid": "0"}
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        self.fault(path)
        if asked := PATHS.fullmatch(path):
            names = parse_qs(body.decode()).get("paths") if body[:1] != b"{" else json.loads(body)["paths"]
            known = self.hub.files.get(asked["repo"], {})
            there = [
                name for name in names or () if name in known or any(file.startswith(f"{name}/") for file in known)
            ]
            return self.answer(200, [self.entry(asked["repo"], name) for name in there])
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401)
        if path == "/api/repos/create":
            name = f"someone/{json.loads(body)['name']}"
            self.hub.files.setdefault(name, {})
            return self.answer(200, {"url": f"{self.hub.endpoint}/{name}", "name": name})
        found = re.fullmatch(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>preupload|commit)/main", path)
        if found and found["what"] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if found:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.hub.files[found["repo"]][line["value"]["path"]] = content
            url = f"{self.hub.endpoint}/{found['repo']}/commit/{COMMIT}"
            return self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        return self.answer(404)
