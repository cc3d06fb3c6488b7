"""A hub of models that is a folder behind a small server on this machine: what `huggingface_hub` asks of one when it creates a repository, uploads and downloads."""
import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = 'hf_' + 'local' * 6


class LocalHub(ThreadingHTTPServer):
    "Repositories are folders `owner/name/commit`, with the last commit of each in `owner/name/head`; large files wait in `lfs`"
    daemon_threads = True

    def __init__(self, folder: Path, *, needs_token: bool = True, lfs: bool = False):
        super().__init__(('127.0.0.1', 0), Handler)
        self.folder, self.needs_token, self.lfs = Path(folder), needs_token, lfs
        self.requests, self.answers, self.private = [], [], set()  # answers: (part of the path, status) to give instead, once each
        (self.folder/'lfs').mkdir(parents=True, exist_ok=True)
        self.thread = threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
        self.thread.start()

    @property
    def address(self) -> str: return f'http://127.0.0.1:{self.server_port}'

    def head(self, repo: str) -> str | None:
        file = self.folder/repo/'head'
        return file.read_text() if file.exists() else None

    def commit_of(self, repo: str, revision: str) -> Path | None:
        "The folder of a commit"
        name = self.head(repo) if revision == 'main' else revision
        return self.folder/repo/name if name and re.fullmatch(r'[0-9a-f]{40}', name) and (self.folder/repo/name).is_dir() else None

    def files(self, repo: str, revision: str = 'main') -> dict[str, Path]:
        commit = self.commit_of(repo, revision)
        return {f.relative_to(commit).as_posix(): f for f in sorted(commit.rglob('*')) if f.is_file()} if commit else {}

    def create(self, repo: str, private: bool) -> bool:
        "False if it is there already"
        if (self.folder/repo).exists(): return False
        (self.folder/repo/('0' * 40)).mkdir(parents=True)
        (self.folder/repo/'head').write_text('0' * 40)
        if private: self.private.add(repo)
        return True

    def commit(self, repo: str, files: dict[str, bytes | Path]) -> str:
        "A new commit with these files beside those of the last one"
        before = self.commit_of(repo, 'main')
        digest = hashlib.sha1(repr((before.name, sorted(files), len(self.requests))).encode()).hexdigest()
        after = before.with_name(digest)
        shutil.copytree(before, after)
        for name, content in files.items(): (after/name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        (self.folder/repo/'head').write_text(digest)
        return digest

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()

    def __enter__(self): return self
    def __exit__(self, *error): self.close()


class Handler(BaseHTTPRequestHandler):
    "One answer"

    def handle_any(self):
        self.hub, self.path = self.server, unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0)) if 'chunked' not in self.headers.get('Transfer-Encoding', '') else self.chunks()
        self.hub.requests.append((self.command, self.path))
        for part, status in self.hub.answers:
            if part in self.path:
                self.hub.answers.remove((part, status))
                return self.reply({'error': 'as the test wishes'}, status)
        for pattern, answer in ROUTES.items():
            command, _, path = pattern.partition(' ')
            if self.command in command.split('|') and (found := re.fullmatch(path, self.path)): return answer(self, *found.groups())
        self.reply({'error': f'{self.command} {self.path}'}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def chunks(self) -> bytes:
        found = b''
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def reply(self, value, status: int = 200, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {'Content-Length': str(len(data)), **headers}.items(): self.send_header(name.replace('_', '-'), text)
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(data)

    def log_message(self, *args): pass

    # Who asks

    @property
    def token(self) -> str | None: return (self.headers.get('Authorization') or '').removeprefix('Bearer ') or None

    def may_write(self) -> bool:
        if not self.hub.needs_token or self.token == TOKEN: return True
        self.reply({'error': 'Invalid username or password.'}, 401)
        return False

    def may_read(self, repo: str) -> bool:
        "As the real hub answers: nobody learns whether a private repository is there"
        if self.token not in (None, TOKEN): self.reply({'error': 'Invalid credentials in Authorization header'}, 401, X_Error_Message='Invalid credentials in Authorization header')
        elif self.hub.head(repo) is None or repo in self.hub.private and self.token is None:
            if self.token: self.reply({'error': 'Repository not found'}, 404, X_Error_Code='RepoNotFound')
            else: self.reply({'error': 'Invalid username or password.'}, 401, X_Error_Code='RepoNotFound', X_Error_Message='Invalid username or password.')
        else: return True
        return False

    # What is asked

    def model(self, repo: str, revision: str | None):
        if not self.may_read(repo): return
        if self.hub.commit_of(repo, revision or 'main') is None: return self.reply({'error': 'Invalid rev id'}, 404, X_Error_Code='RevisionNotFound')
        names = [{'rfilename': o} for o in self.hub.files(repo, revision or 'main')]
        self.reply({'id': repo, 'modelId': repo, 'sha': revision or self.hub.head(repo), 'private': repo in self.hub.private, 'siblings': names, 'tags': [], 'downloads': 0})

    def create(self):
        if not self.may_write(): return
        asked = json.loads(self.body)
        repo = f"{asked['organization'] or 'somebody'}/{asked['name']}"
        private = asked.get('private') or asked.get('visibility') == 'private'
        self.reply({'url': f'{self.hub.address}/{repo}'}, 200 if self.hub.create(repo, bool(private)) else 409)

    def validate(self): self.reply({'errors': [], 'warnings': []})

    def preupload(self, repo: str, revision: str):
        if not self.may_write(): return
        mode = lambda f: 'lfs' if self.hub.lfs and not f['path'].endswith('.md') else 'regular'
        self.reply({'files': [{'path': f['path'], 'uploadMode': mode(f), 'shouldIgnore': False, 'oid': None} for f in json.loads(self.body)['files']]})

    def lfs_batch(self, repo: str):
        actions = lambda oid: {'upload': {'href': f'{self.hub.address}/lfs/{oid}'}, 'verify': {'href': f'{self.hub.address}/lfs-verify'}}
        self.reply({'transfer': 'basic', 'objects': [{**o, 'actions': actions(o['oid'])} for o in json.loads(self.body)['objects']]})

    def lfs_put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid: return self.reply({'error': 'other content'}, 422)
        (self.hub.folder/'lfs'/oid).write_bytes(self.body)
        self.reply({})

    def lfs_verify(self):
        asked = json.loads(self.body)
        file = self.hub.folder/'lfs'/asked['oid']
        self.reply({}, 200 if file.exists() and file.stat().st_size == asked['size'] else 404)

    def lfs_get(self, oid: str): self.reply((self.hub.folder/'lfs'/oid).read_bytes(), ETag=f'"{oid}"')

    def commit(self, repo: str, revision: str):
        if not self.may_write(): return
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        files = {o['value']['path']: base64.b64decode(o['value']['content']) for o in lines if o['key'] == 'file'}
        files |= {o['value']['path']: self.hub.folder/'lfs'/o['value']['oid'] for o in lines if o['key'] == 'lfsFile'}
        digest = self.hub.commit(repo, files)
        self.reply({'success': True, 'commitOid': digest, 'commitUrl': f'{self.hub.address}/{repo}/commit/{digest}', 'hookOutput': ''})

    def resolve(self, repo: str, revision: str, name: str):
        if not self.may_read(repo): return
        commit = self.hub.commit_of(repo, revision)
        if commit is None: return self.reply({'error': 'Invalid rev id'}, 404, X_Error_Code='RevisionNotFound')
        file = self.hub.files(repo, revision).get(name)
        if file is None: return self.reply({'error': 'Entry not found'}, 404, X_Error_Code='EntryNotFound', X_Repo_Commit=commit.name)
        data, digest = file.read_bytes(), hashlib.sha256(file.read_bytes()).hexdigest()
        if not (self.hub.folder/'lfs'/digest).exists(): return self.reply(data, ETag=f'"{digest}"', X_Repo_Commit=commit.name)
        self.reply(b'', 302, Location=f'http://localhost:{self.hub.server_port}/lfs/{digest}', X_Repo_Commit=commit.name, X_Linked_Size=str(len(data)), X_Linked_Etag=f'"{digest}"')


ROUTES = {
    'GET /api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?': Handler.model,
    'POST /api/repos/create': Handler.create,
    'POST /api/validate-yaml': Handler.validate,
    'POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)': Handler.preupload,
    'POST /([^/]+/[^/]+)\\.git/info/lfs/objects/batch': Handler.lfs_batch,
    'PUT /lfs/([0-9a-f]+)': Handler.lfs_put,
    'POST /lfs-verify': Handler.lfs_verify,
    'GET|HEAD /lfs/([0-9a-f]+)': Handler.lfs_get,
    'POST /api/models/([^/]+/[^/]+)/commit/([^/]+)': Handler.commit,
    'GET|HEAD /([^/]+/[^/]+)/resolve/([^/]+)/(.+)': Handler.resolve,
}
