"""Celery on Redis, as FastAPI's page on background tasks names it for heavier work: acks_late, two processes, no results.

It answers as engine-process.js does, over the channel that Node's `fork` opens: a line of JSON for each message.
"""
import json
import os
import socket
import subprocess
import sys

from celery import Celery
from redis import Redis

URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
PREFIX = os.environ["BENCH_PREFIX"]
PAYLOAD = {"to": "ada@example.com", "subject": "Your order", "text": "x" * 150}

app = Celery("celery_app", broker=URL)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue="bench",
    broker_transport_options={"global_keyprefix": f"{PREFIX}:"},
    worker_hijack_root_logger=False,
)


@app.task(name="bench")
def bench(payload):
    pass


def main():
    channel = socket.socket(fileno=int(os.environ["NODE_CHANNEL_FD"]))
    lines = channel.makefile("r")
    redis = Redis.from_url(URL)
    state = {"stored": 0, "worker": None}

    def store(count):
        for _ in range(int(count)):
            bench.delay(PAYLOAD)
        state["stored"] += int(count)

    def drain():
        state["worker"] = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "celery_app", "worker", "--concurrency", "2", "--loglevel", "ERROR",
             "--without-gossip", "--without-mingle", "--without-heartbeat"],
            cwd=os.path.dirname(__file__),
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ran():
        return state["stored"] - redis.llen(f"{PREFIX}:bench") - redis.hlen(f"{PREFIX}:unacked")

    def end():
        state["worker"].terminate()
        state["worker"].wait()
        for key in redis.scan_iter(f"{PREFIX}:*", 1000):
            redis.unlink(key)

    answers = {"store": store, "drain": drain, "ran": ran, "end": end}

    def send(value):
        channel.sendall(json.dumps(value).encode() + b"\n")

    send(None)
    for line in lines:
        name, *args = json.loads(line).split()
        send(answers[name](*args))


if __name__ == "__main__":
    main()
