"""Completions from an OpenAI-compatible inference server: token ids in, token ids and log-probs out.

The protocol is that of vLLM (0.28 or later), whose options go beyond OpenAI's. The server loads weights from
a folder, which it must see under the same path as the trainer:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL                                 if all weights are trained
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora       if an adapter is trained
        --max-lora-rank RANK

At a temperature other than 1 it also needs `--logprobs-mode processed_logprobs`: without it, vLLM returns the
log-probs of temperature 1. The environment variable VLLM_API_KEY, if set, is sent as the server's key.

vLLM continues a prompt from its prefix cache even if other weights filled it. So each request has a salt,
which is new after each update: what other weights computed is not used.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from grpo_fast.trainer.quoting import quoted

FIRST_DELAY, LONGEST_DELAY = 2.0, 60.0  # seconds between the first two tries; between any two

# The whole distribution, whatever the generation_config.json of the model says.
NEUTRAL = {
    "n": 1,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,  # stop_token_ids has the tokens that end a completion, and only those
    "return_token_ids": True,
}


class ServerError(ConnectionError):
    """An error of the server, or on the way to it; one line says what was asked, and what came back.

    Attributes:
        status: the HTTP status, if it is the error; or None.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


@dataclass(frozen=True)
class Completion:
    """A completion of T >= 1 tokens.

    Attributes:
        ids: T token ids; the token that ended it is the last one.
        logps: T log-probs of these tokens, in nats, at the temperature that they were sampled at; at a
            temperature of 0, those of temperature 1.
        ended: an end token was sampled; False if the length limit cut the completion off.
    """

    ids: list[int]
    logps: list[float]
    ended: bool


class Server:
    """A client of one inference server.

    A request is sent again if the server cannot be reached, does not answer in time, or says that the error
    is its own (HTTP 5xx). The delay doubles from try to try.

    Args:
        url: such as http://localhost:8000; a final /v1 is ignored.
        model: the name of the model at the server; default: the first one that is no adapter.
        timeout: seconds until an answer must have come.
        retries: the number of tries after the first one.
        parallel: the largest number of requests at the same time.

    Raises:
        ValueError: the url is none.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        timeout: float = 600.0,
        retries: int = 5,
        parallel: int = 64,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"server: want a url such as http://localhost:8000, got {url!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model, self.timeout, self.retries, self.parallel = model, timeout, retries, parallel
        self._checked = self._tempered = False  # _tempered: log-probs are those at the temperature
        self._adapter: str | None = None
        self._salt = uuid.uuid4().hex
        self._loaded: tuple[Path, bool] | None = None  # the last update
        self._told = self._down = False  # in this call: a retry was told of; nothing listened

    def check(self) -> None:
        """Make sure that the server answers, has the model, and returns token ids and log-probs.

        Raises:
            ServerError: it does not; the message says what to do.
        """
        self._told = False
        models = self._json("/v1/models").get("data")
        if not isinstance(models, list) or not all(isinstance(m, dict) for m in models):
            raise self._malformed("/v1/models", "data", models)
        names = [m.get("id") for m in models]
        if self.model is None:
            names = [m.get("id") for m in models if m.get("parent") is None]
            if not names:
                raise ServerError(f"server {self.url}: it serves no model; start it with one")
            self.model = str(names[0])
        elif self.model not in names:
            raise ServerError(
                f"server {self.url}: no model {self.model!r}; it serves {', '.join(map(str, names))}"
            )
        self._checked, self._tempered = True, False
        # The embedding of a padding token may be 0; then all tokens are as likely after it.
        for token in (2, 1, 0):
            spread = self._spread(token, 1.0)
            if spread > 1e-3:
                # At temperature 2 it is half of that, unless the log-probs ignore the temperature.
                self._tempered = self._spread(token, 2.0) < 0.75 * spread
                break

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: list[int],
        eos_ids: list[int],
    ) -> list[Completion]:
        """Sample one completion per prompt from the whole distribution, in the order of the prompts.

        If the server was restarted meanwhile, the last update is made again, and all are sampled again.

        Args:
            prompts: B lists of token ids.
            temperature: 0 is greedy.
            seeds: B numbers in [0, 2^63). The same seed, prompt and weights give the same completion, as far
                as the server's arithmetic does not depend on what it computes at the same time.
            eos_ids: the tokens that end a completion.

        Raises:
            ServerError: the server cannot be reached, refuses a request, or answers with anything else than
                as many log-probs as tokens; or its log-probs are not those of the temperature.
        """
        if not self._checked:
            self.check()
        if temperature not in (0, 1) and not self._tempered:
            raise ServerError(
                f"server {self.url}: its log-probs are those of temperature 1, not {temperature}; start "
                "vllm with --logprobs-mode processed_logprobs, or set temperature=1"
            )
        tasks = list(zip(prompts, seeds, strict=True))
        settings = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "stop_token_ids": eos_ids,
            "logprobs": 0,  # of the sampled token alone
        }

        def complete(i: int, stop: threading.Event) -> Completion:
            prompt, seed = tasks[i]
            choice = self._choice({"prompt": prompt, "seed": seed, **settings}, stop)
            return self._completion(choice, prompt, max_new_tokens, eos_ids)

        for _ in range(self.retries + 1):
            self._told = self._down = False
            try:
                found = self._each(complete, len(tasks))
            except ServerError as error:
                # A server that was restarted does not have the adapter.
                if self._loaded is None or self._adapter is None or error.status != 404:
                    raise
            else:
                if self._loaded is None or not self._down:
                    return found
            self.update_weights(*self._loaded)
        raise ServerError(f"server {self.url}: it went down again and again while it sampled")

    def update_weights(self, folder: Path, adapter: bool) -> None:
        """Make the server load weights; `generate` samples from them from then on.

        The server may read the folder again until the next update. Adapters get a new name each time: vLLM
        reads one that it loaded in place from the disk again at every step, and keeps its stale cache.

        Args:
            folder: a complete Hugging Face checkpoint, or a peft adapter; the server sees the same path.

        Raises:
            ServerError: the folder has no weights, or the server did not load them. Do not sample then: vLLM
                may have half of the weights.
        """
        self._told = False
        folder = Path(folder).absolute()
        if not any(folder.glob("*.safetensors")):  # a folder without any would end the server
            raise ServerError(f"{folder}: no weights there (*.safetensors) for server {self.url}")
        previous, name = self._adapter, f"grpo-fast-{uuid.uuid4().hex}" if adapter else None
        path, start = "/collective_rpc", "VLLM_SERVER_DEV_MODE=1"
        call: dict[str, Any] = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        if adapter:
            path, call = "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}
            start = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
        try:
            self._send(path, call)
        except ServerError as error:
            # The name is new: if there is such an adapter, the answer of an earlier try was lost.
            if error.status != 400 or "already been loaded" not in str(error):
                advice = f"; start vllm with {start}, where it sees the folder under the same path"
                text = f"{error}{advice if error.status else ''}"
                raise ServerError(text, error.status) from error
        self._adapter, self._salt, self._loaded = name, uuid.uuid4().hex, (folder, adapter)
        if previous is not None:
            with contextlib.suppress(ServerError):  # one that was restarted has no such adapter
                self._send("/v1/unload_lora_adapter", {"lora_name": previous})

    @property
    def loaded(self) -> tuple[str | None, str, tuple[Path, bool] | None]:
        """The state after an update, for the `Server` objects of other processes."""
        return self._adapter, self._salt, self._loaded

    @loaded.setter
    def loaded(self, state: tuple[str | None, str, tuple[Path, bool] | None]) -> None:
        self._adapter, self._salt, self._loaded = state

    def _spread(self, token: int, temperature: float) -> float:
        """Return the difference of the largest and the fifth largest log-prob after a token."""
        asked = {"model": self.model, "prompt": [token], "max_tokens": 1, "seed": 0}
        shown = {"logprobs": 5, "return_tokens_as_token_ids": True}
        choice = self._choice({**asked, **shown, "temperature": temperature})
        self._completion(choice, [token], 1, [])
        top = choice["logprobs"].get("top_logprobs")
        try:
            values = sorted(top[0].values(), reverse=True)[:5]
            return values[0] - values[-1]
        except (TypeError, AttributeError, LookupError):
            raise self._malformed("/v1/completions", "logprobs.top_logprobs", top) from None

    def _choice(self, body: dict[str, Any], stop: threading.Event | None = None) -> dict[str, Any]:
        """Request a completion, and return the server's description of it."""
        model = self._adapter or self.model
        asked = {"model": model, **NEUTRAL, "cache_salt": self._salt, **body}
        choices = self._json("/v1/completions", asked, stop).get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._malformed("/v1/completions", "choices", choices)
        return choices[0]

    def _completion(
        self, choice: dict[str, Any], prompt: list[int], longest: int, eos_ids: list[int]
    ) -> Completion:
        """Check what the server says of a completion."""

        def bad(field: str, value: object) -> ServerError:
            return self._malformed("/v1/completions", field, value)

        read, ids = choice.get("prompt_token_ids"), choice.get("token_ids")
        logps, finish = choice.get("logprobs"), choice.get("finish_reason")
        logps = logps.get("token_logprobs") if isinstance(logps, dict) else logps
        if read is not None and read != prompt:
            raise bad("prompt_token_ids (not those of the request)", read)
        if not isinstance(ids, list) or not all(type(i) is int for i in ids) or not ids:
            raise bad("token_ids", ids)
        if not isinstance(logps, list) or len(logps) != len(ids):
            raise bad(f"logprobs.token_logprobs of {len(ids)} tokens", logps)
        # vLLM writes -9999 in place of -inf; a rounded log-prob of 0 can be positive.
        wrong = [x for x in logps if type(x) not in (int, float) or not -9999 < x < 1e-3]
        if wrong:
            raise bad("logprobs.token_logprobs", wrong[0])
        ended = ids[-1] in eos_ids
        if (finish, ended) != ("stop", True) and (finish, len(ids)) != ("length", longest):
            where = f"after {len(ids)} of {longest} tokens, the last {ids[-1]}"
            raise bad(f"finish_reason {where}", finish)
        return Completion(ids, [float(x) for x in logps], ended)

    def _each(
        self, work: Callable[[int, threading.Event], Completion], count: int
    ) -> list[Completion]:
        """Return work(0), ..., work(count - 1); the first error ends them all.

        The threads are daemons, so that a request that hangs cannot delay the end of the process.
        """
        stop = threading.Event()
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for i in range(count):
            todo.put(i)

        def run() -> None:
            with contextlib.suppress(queue.Empty):
                while not stop.is_set():
                    i = todo.get_nowait()
                    try:
                        done.put((i, work(i, stop)))
                    except Exception as error:
                        done.put((i, error))

        found: dict[int, Completion] = {}
        try:
            for _ in range(min(count, self.parallel)):
                threading.Thread(target=run, daemon=True).start()
            while len(found) < count:
                i, result = done.get()
                if isinstance(result, Exception):
                    raise result
                found[i] = result
        finally:
            stop.set()
        return [found[i] for i in range(count)]

    def _json(
        self, path: str, body: dict[str, Any] | None = None, stop: threading.Event | None = None
    ) -> dict[str, Any]:
        """Make a request, and return the JSON object of the answer."""
        answer = self._send(path, body, stop)
        try:
            value = json.loads(answer)
        except ValueError:
            value = answer
        if not isinstance(value, dict):
            raise self._malformed(path, "the answer (want a JSON object)", value)
        return value

    def _send(
        self, path: str, body: dict[str, Any] | None = None, stop: threading.Event | None = None
    ) -> bytes:
        """Make a request, again if need be, and return the answer."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        asked = f"server {self.url}: {'GET' if data is None else 'POST'} {path}"
        for i in range(self.retries + 1):
            status = None
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                status, answer = _answer(request, self.timeout)
                if status < 300:
                    return answer
                cause = f"HTTP {status}: {_said(answer)}"
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", error)
                self._down |= isinstance(reason, ConnectionRefusedError)
                cause = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            if status is not None and status < 500:
                raise ServerError(f"{asked}: {cause}", status)
            if i < self.retries:
                self._tell(f"{asked}: {cause}; trying again")
                if (stop or threading.Event()).wait(min(FIRST_DELAY * 2**i, LONGEST_DELAY)):
                    break
        advice = "" if status else "; is it running, and is the url right?"
        raise ServerError(f"{asked}: {cause} ({self.retries + 1} tries){advice}", status)

    def _tell(self, text: str) -> None:
        """Say once in a call what goes wrong."""
        if not self._told:
            self._told = True
            print(text, file=sys.stderr, flush=True)

    def _malformed(self, path: str, field: str, value: object) -> ServerError:
        return ServerError(
            f"server {self.url}: {path}: cannot use {field}: {quoted(value, 100)}; want vLLM 0.28 or later"
        )


def _answer(request: urllib.request.Request, timeout: float) -> tuple[int, bytes]:
    """Return the status and the body of the answer to a request."""
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def _said(answer: bytes) -> str:
    """Return the message of an error of the server; vLLM and FastAPI name it differently."""
    try:
        value = json.loads(answer)
        error = value.get("error", value.get("detail", value))
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return answer[:300].decode(errors="replace") or "no message"
