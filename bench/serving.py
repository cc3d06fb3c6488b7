"""Servers under load: p50, p99 and images/s at 1, 8 and 32 clients (part of `make bench`).

Each client sends a JPEG of 500x375 pixels in a form, waits for the answer, and sends the next one. A resnet18 at 224 pixels
answers, with one torch thread, in three servers: lamella's; the floor, FastAPI around hand-written code that calls the model for each request;
and FastAPI around fastai's `learn.predict`, which has to be locked, since it is not made for several threads."""
import argparse
import http.client
import io
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE/'rows'))
SERVERS, CLIENTS = ('fastai', 'lamella', 'floor'), (1, 8, 32)
HEADER = 'clients', 'server', 'p50 ms', 'p99 ms', 'images/s', 'requests', 'failed'


@dataclass
class Result:
    "What the clients of one server saw"
    clients: int
    server: str
    p50: float  # milliseconds
    p99: float
    speed: float # images/s
    requests: int
    failed: int

    def cells(self) -> tuple[str, ...]:
        "A line of the table"
        return str(self.clients), self.server, f'{self.p50:.0f}', f'{self.p99:.0f}', f'{self.speed:.1f}', str(self.requests), str(self.failed)


def main() -> int:
    "Measure, print, save; the exit code is 1 if a request failed"
    args = parse_args()
    if args.serve: return run_server(args.serve, args.port)
    results = [result for name in args.servers for result in measure(name, args.seconds)]
    results.sort(key=lambda o: (o.clients, SERVERS.index(o.server)))
    print_table(results)
    if args.json: args.json.write_text(json.dumps([asdict(o) for o in results], indent=2) + '\n', encoding='utf-8')
    return int(any(o.failed for o in results))


def parse_args() -> argparse.Namespace:
    "The command line"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--servers', nargs='+', choices=SERVERS, default=SERVERS, help='only these')
    parser.add_argument('--seconds', type=float, default=10., help='how long each number of clients asks')
    parser.add_argument('--json', type=Path, metavar='FILE', help='save the results here')
    parser.add_argument('--serve', choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument('--port', type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def print_table(results: list[Result]) -> None:
    "In markdown, as readable in a terminal"
    from run import in_markdown
    print(in_markdown([HEADER, *[o.cells() for o in results]]))
    print(f'One run; one torch thread; clients and server share {os.cpu_count()} cores; python {platform.python_version()}')


# Clients

def measure(name: str, seconds: float) -> list[Result]:
    "Start a server in a process of its own, and let clients ask it"
    with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
    env = os.environ | dict(CUDA_VISIBLE_DEVICES='', PYTHONWARNINGS='ignore', MPLBACKEND='Agg')
    process = subprocess.Popen([sys.executable, __file__, '--serve', name, '--port', str(port)], env=env, stdout=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        messages = [in_form(file.read_bytes()) for file in some_photos()]
        load(port, messages, 2, 1.)
        return [summary(name, n, *load(port, messages, n, seconds)) for n in CLIENTS]
    finally:
        process.terminate()
        process.wait()


def some_photos(n: int = 64) -> list[Path]:
    "Those that all are asked with"
    from _common import photos
    return random.Random(0).sample(sorted(photos().glob('*/*.jpg')), n)


def wait_for(port: int, process: subprocess.Popen, seconds: float = 120) -> None:
    "Until the server listens"
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try: return socket.create_connection(('127.0.0.1', port)).close()
        except OSError: time.sleep(.1)
    raise RuntimeError('the server did not start')


def in_form(data: bytes) -> bytes:
    "The body of a form with one file"
    return b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n' + data + b'\r\n--B--\r\n'


def load(port: int, messages: list[bytes], clients: int, seconds: float) -> tuple[list[float], int, float]:
    "The seconds of each answered request, how many failed, and the seconds of it all"
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool: found = list(pool.map(lambda k: client(port, messages, k, start + seconds), range(clients)))
    return [o for times, _ in found for o in times], sum(failed for _, failed in found), time.perf_counter() - start


def client(port: int, messages: list[bytes], number: int, until: float) -> tuple[list[float], int]:
    "One request after another on one connection"
    line, times, failed = http.client.HTTPConnection('127.0.0.1', port, timeout=120), [], 0
    while (start := time.perf_counter()) < until:
        line.request('POST', '/predict', messages[(number + len(times)) % len(messages)], {'Content-Type': 'multipart/form-data; boundary=B'})
        answer = line.getresponse()
        failed += answer.status != 200 or not json.loads(answer.read())
        times.append(time.perf_counter() - start)
    line.close()
    return times, failed


def summary(name: str, clients: int, times: list[float], failed: int, seconds: float) -> Result:
    "Percentiles and speed"
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, int(.99 * len(ordered)))]
    return Result(clients, name, 1e3 * statistics.median(ordered), 1e3 * p99, len(times) / seconds, len(times), failed)


# Servers

def run_server(name: str, port: int) -> int:
    "Serve until the process is ended"
    from _common import prepare
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        if name == 'lamella': serve_lamella(port)
        else: serve_by_hand({'fastai': fastai_predict, 'floor': floor_predict}[name](), port)
    return 0


def make_learner(name: str):
    "An untrained resnet18 with what it needs to open pictures"
    from _common import library, photos
    vision = library(name)
    dls = vision.DataBlock(
        blocks=(vision.ImageBlock, vision.CategoryBlock), get_items=vision.get_image_files, get_y=vision.parent_label,
        splitter=vision.RandomSplitter(valid_pct=0.2, seed=100), item_tfms=vision.Resize(224),
        batch_tfms=vision.Normalize.from_stats(*vision.imagenet_stats)).dataloaders(photos(), bs=16, num_workers=0)
    return vision.vision_learner(dls, vision.resnet18, pretrained=False)


def serve_lamella(port: int) -> None:
    "What users get"
    make_learner('lamella').export('model.pkl')
    from lamella.serve import serve
    serve('model.pkl', port=port, log_level='warning')


def serve_by_hand(predict, port: int) -> None:
    "What people write: one call of the model for each request, in the threads of FastAPI"
    import uvicorn
    from fastapi import FastAPI, UploadFile
    app = FastAPI()

    @app.post('/predict')
    def answer(file: UploadFile): return predict(file.file.read())
    uvicorn.run(app, port=port, log_level='warning')


def fastai_predict():
    "One at a time"
    learn, lock = make_learner('fastai'), threading.Lock()

    def predict(data: bytes) -> dict:
        with lock, learn.no_bar(): label, _, probabilities = learn.predict(data)
        return {'label': str(label), 'probabilities': dict(zip(learn.dls.vocab, probabilities.tolist()))}
    return predict


def floor_predict():
    "Pillow, torchvision and PyTorch"
    import torch
    from PIL import Image, ImageOps
    from predict import make_model
    from torchvision.transforms.functional import normalize, to_tensor
    model, vocab, mean, std = make_model(4), ['animals', 'medicine', 'space', 'things'], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

    def predict(data: bytes) -> dict:
        small = ImageOps.fit(Image.open(io.BytesIO(data)).convert('RGB'), (224, 224), Image.Resampling.BILINEAR)
        with torch.inference_mode(): found = model(normalize(to_tensor(small), mean, std)[None]).softmax(-1)[0]
        return {'label': vocab[found.argmax()], 'probabilities': dict(zip(vocab, found.tolist()))}
    return predict


if __name__ == '__main__': sys.exit(main())
