"""A tiny OpenAI-compatible endpoint for tests, honest or hostile, that keeps its own count.

Run as a program it prints its port; `GET /count` tells what it counted. A reply depends on the
caption alone, so that two runs can be compared letter by letter. Hostility depends on the number
of the request, so that a caption which was maltreated once is answered the next time.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

FORM = 'question: "{}"\nanswer: "{}"'


def count_tokens(text: str) -> int:
    """Count as the endpoint pleases; deliberately not our estimate."""
    return len(re.findall(r"\w{1,6}|[^\w\s]", text))


def reply_text(caption: str) -> str:
    """Return the deterministic pairs for a caption."""
    seed = hashlib.sha256(caption.encode()).hexdigest()[:6]
    pairs = [
        ("What does the image show?", f"The image shows {caption[:60].strip()} ({seed})."),
        ("Is tissue visible in the image?", "Yes."),
        ("How would you describe the tissue?", f"It is described by {len(caption)} letters."),
        ("Which features are seen?", f"Features number {int(seed, 16) % 7} are seen."),
    ]
    return "\n".join(FORM.format(*pair) for pair in pairs)


@dataclass
class Endpoint:
    """What the endpoint does and what it counted."""

    delay_s: float = 0.0
    hostile: bool = False
    seed: int = 0
    key: str | None = None
    usage: bool = True
    stored_model: str | None = None
    retry_after_s: float = 0.05
    hang_s: float = 30.0
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    hung: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    batch_only_errors: bool = False
    batch_polls: int = 1
    port: int = 0

    def count(self) -> dict[str, Any]:
        """Return the endpoint's own books."""
        return {
            "requests": self.requests,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "hung": self.hung,
            "kinds": dict(self.kinds),
            "asked": dict(self.asked),
            "answered": dict(self.answered),
        }

    # -- HTTP -----------------------------------------------------------------------------

    async def serve(self) -> asyncio.Server:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _connection(self, reader: Any, writer: Any) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode("latin-1").split("\r\n")
                method, path, _ = first.split(" ", 2)
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in lines if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if await self._answer(writer, method, path, headers, body):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, writer: Any, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> bool:
        """Answer one request; return whether the connection is to be closed."""
        if path == "/count":
            return await self._send(writer, 200, self.count())
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            self.kinds["401"] += 1
            return await self._send(writer, 401, {"error": {"message": "bad key"}})
        if method == "POST" and path == "/v1/chat/completions":
            return await self._chat(writer, json.loads(body))
        if path.startswith(("/v1/files", "/v1/batches")):
            status, value = self._batch(method, path, headers, body)
            return await self._send(writer, status, value)
        return await self._send(writer, 404, {"error": {"message": f"no route {path}"}})

    async def _send(
        self,
        writer: Any,
        status: int,
        value: Any,
        extra: str = "",
        *,
        cut: bool = False,
        times: int = 1,
    ) -> bool:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = "application/jsonl" if isinstance(value, bytes) else "application/json"
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n"
        whole = f"{head}{extra}\r\n".encode() + (data[: len(data) // 2] if cut else data)
        # Both copies of a reply in one go: one that came after the next request was sent could not
        # be told from that one's answer, by any client.
        writer.write(times * whole)
        await writer.drain()
        return cut

    # -- chat -----------------------------------------------------------------------------

    async def _chat(self, writer: Any, body: dict[str, Any]) -> bool:
        self.requests += 1
        caption = body["messages"][-1]["content"]
        self.asked[caption] += 1
        kind = self._kind(self.requests)
        self.kinds[kind] += 1
        if kind == "429":
            extra = f"Retry-After: {self.retry_after_s}\r\n"
            return await self._send(writer, 429, {"error": {"message": "slow down"}}, extra)
        if kind == "500":
            return await self._send(writer, 500, {"error": {"message": "oops"}})
        if kind == "hang":
            self.hung += 1
            await asyncio.sleep(self.hang_s)
            return True
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        reply = self._completion(body, kind)
        if kind == "cut_http":
            # Half a body: the client cannot know what it was; it is ours to call it not arrived.
            return await self._send(writer, 200, reply, cut=True)
        self.input_tokens += reply["_counted"][0]
        self.output_tokens += reply["_counted"][1]
        if kind in ("ok", "twice"):
            self.answered[caption] += 1
        await self._send(writer, 200, reply, times=2 if kind == "twice" else 1)
        return kind == "twice"

    def _kind(self, number: int) -> str:
        if not self.hostile:
            return "ok"
        share = random.Random(f"{self.seed}:{number}").random()
        for kind, width in (
            *(("429", 0.10), ("500", 0.05), ("hang", 0.02), ("cut_text", 0.015)),
            *(("cut_http", 0.015), ("wrong_model", 0.02), ("twice", 0.03)),
        ):
            if share < width:
                return kind
            share -= width
        return "ok"

    def _completion(self, body: dict[str, Any], kind: str) -> dict[str, Any]:
        caption = body["messages"][-1]["content"]
        text = reply_text(caption)
        finish = "stop"
        if kind == "cut_text":
            text, finish = text[:20], "length"
        inputs = sum(4 + count_tokens(message["content"]) for message in body["messages"])
        counted = (inputs, count_tokens(text))
        model = "another-model" if kind == "wrong_model" else self.stored_model or body["model"]
        reply: dict[str, Any] = {
            "id": f"chatcmpl-{self.requests}",
            "object": "chat.completion",
            "created": 0,
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": finish,
                }
            ],
            "_counted": counted,
        }
        if self.usage:
            reply["usage"] = {
                "prompt_tokens": counted[0],
                "completion_tokens": counted[1],
                "total_tokens": sum(counted),
            }
        return reply

    # -- files and batches ----------------------------------------------------------------

    def _batch(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, Any]:
        parts = path.removeprefix("/v1/").split("?")[0].split("/")
        if parts[0] == "files" and method == "POST":
            name = f"file-{len(self.files)}"
            self.files[name] = _uploaded_file(headers["content-type"], body)
            return 200, _file_object(name, len(self.files[name]))
        if parts[0] == "files" and parts[-1] == "content":
            return 200, self.files[parts[1]]
        if parts[0] == "batches" and method == "POST":
            return 200, self._create_batch(json.loads(body))
        if parts[0] == "batches" and len(parts) == 2 and parts[1] in self.batches:
            return 200, self._poll(parts[1])
        if parts[0] == "batches" and len(parts) == 1:
            data = list(self.batches.values())
            return 200, {"object": "list", "data": data, "has_more": False}
        return 404, {"error": {"message": "no such thing"}}

    def _create_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        name = f"batch-{len(self.batches)}"
        self.batches[name] = {
            "id": name,
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "created_at": 0,
            "status": "in_progress",
            "metadata": body.get("metadata"),
            "_polls": self.batch_polls,
        }
        return self.batches[name]

    def _poll(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        batch["_polls"] -= 1
        if batch["_polls"] > 0 or batch["status"] == "completed":
            return batch
        good, bad = [], []
        for line in self.files[batch["input_file_id"]].splitlines():
            item = json.loads(line)
            self.requests += 1
            number = self.requests
            answer: dict[str, Any] = {"id": f"r{number}", "custom_id": item["custom_id"]}
            if self.batch_only_errors or self._kind(number) == "500":
                error = {"error": {"message": "the model broke"}}
                bad.append({**answer, "response": {"status_code": 500, "body": error}})
                continue
            reply = self._completion(item["body"], "ok")
            self.asked[item["body"]["messages"][-1]["content"]] += 1
            self.input_tokens += reply["_counted"][0]
            self.output_tokens += reply["_counted"][1]
            good.append({**answer, "response": {"status_code": 200, "body": reply}, "error": None})
        random.Random(0).shuffle(good)
        for field_name, rows in (("output_file_id", good), ("error_file_id", bad)):
            if rows:
                file_id = f"file-{len(self.files)}"
                self.files[file_id] = "".join(json.dumps(row) + "\n" for row in rows).encode()
                batch[field_name] = file_id
        batch["status"] = "completed"
        return batch


def _uploaded_file(content_type: str, body: bytes) -> bytes:
    message = BytesParser(policy=HTTP).parsebytes(
        f"Content-Type: {content_type}\r\n\r\n".encode() + body
    )
    for part in message.iter_parts():
        if part.get_filename():
            found = part.get_payload(decode=True)
            assert isinstance(found, bytes)
            return found
    raise AssertionError("no file was uploaded")


def _file_object(name: str, size: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "file",
        "bytes": size,
        "created_at": 0,
        "filename": "requests.jsonl",
        "purpose": "batch",
        "status": "processed",
    }


class Running:
    """An endpoint in a thread of this process: `with Running(Endpoint()) as endpoint`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()

    def __enter__(self) -> Endpoint:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self.endpoint

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self.endpoint.serve())
        self._ready.set()
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


def url(endpoint: Endpoint) -> str:
    """Return the address to give to --endpoint."""
    return f"http://127.0.0.1:{endpoint.port}/v1"


async def _main(endpoint: Endpoint) -> None:
    server = await endpoint.serve()
    print(endpoint.port, flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--hostile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    asyncio.run(_main(Endpoint(delay_s=options.delay, hostile=options.hostile, seed=options.seed)))
