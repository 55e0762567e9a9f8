"""A stand-in for the hub's HTTP API, as much of it as an upload needs: files arrive in the commit or as LFS objects."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub:
    """A hub with one account, `me`; a context.

    Args:
        token: of the account; others get a 401.
        status: of every answer to a commit; 200 takes it.

    Attributes:
        repositories: by name, whether it is private and its files.
        requests: method and path of each, in order.
    """

    def __init__(self, token: str, status: int = 200):
        self.token, self.status = token, status
        self.repositories: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, body: bytes) -> tuple[int, object]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.repositories
        self.repositories.setdefault(name, {"private": asked.get("visibility") == "private", "files": {}})
        return 409 if known else 200, {"url": f"{self.url}/{name}"}

    def preupload(self, body: bytes) -> tuple[int, object]:
        """Weights as LFS objects, as the hub's .gitattributes wants them."""
        files = [each["path"] for each in json.loads(body)["files"]]
        large = (".onnx", ".safetensors", ".pt2", ".pte")
        modes = {path: "lfs" if path.endswith(large) else "regular" for path in files}
        answer = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        return 200, {"files": answer}

    def batch(self, body: bytes) -> tuple[int, object]:
        objects = json.loads(body)["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, oid: str, body: bytes) -> tuple[int, object]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {}
        self.objects[oid] = body
        return 200, {}

    def commit(self, name: str, body: bytes) -> tuple[int, object]:
        if self.status != 200:
            return self.status, {"error": f"refused for {self.token}"}
        files = self.repositories[name]["files"]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}

    def look(self, path: str) -> tuple[int, object]:
        """What there is of a repository: itself, or its files."""
        name, _, rest = path.partition("/tree/")
        if (repository := self.repositories.get(name)) is None:
            return 404, {"error": "Not found"}
        if rest:
            files = repository["files"].items()
            return 200, [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in files]
        siblings = [{"rfilename": path} for path in repository["files"]]
        return 200, {"id": name, "private": repository["private"], "siblings": siblings, "sha": "0" * 40}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def answer(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {path}")
        if not path.startswith("/lfs/") and self.headers["Authorization"] != f"Bearer {hub.token}":
            status, found = 401, {"error": "Invalid username or password."}
        elif path == "/api/repos/create":
            status, found = hub.create(body)
        elif path == "/api/validate-yaml":
            status, found = 200, {"errors": [], "warnings": []}
        elif path.startswith("/lfs/"):
            status, found = hub.put(path.removeprefix("/lfs/"), body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            status, found = hub.batch(body)
        elif path.endswith("/preupload/main"):
            status, found = hub.preupload(body)
        elif path.endswith("/commit/main"):
            status, found = hub.commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        else:
            status, found = hub.look(path.removeprefix("/api/models/"))
        content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = answer  # noqa: N815 - as http.server calls them

    def log_message(self, *_) -> None:
        pass
