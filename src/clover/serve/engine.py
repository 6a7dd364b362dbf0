"""One thread that computes: questions at different stages share one batch of a language model.

In: questions about images, from any thread. Out: pieces of answers as they are written. Everything
that touches a model runs in the engine's thread, so that nothing in it needs a lock; `call` runs a
caller's own function there (heat maps, slide regions).

What need not be computed twice:

* an image's features, kept by the SHA-256 of its bytes: a further question costs no encoder;
* the constant text before the image, read once for all questions;
* a prompt's beginning that an earlier prompt shares. The Q-Former reads the question, so another
  question about the same image gives other visual tokens, and nothing after them can be reused;
  the same question asked again, and every turn of a model whose Q-Former does not read the
  question, goes on where the earlier one stood.

Models whose rows cannot be at different stages (encoder-decoder, sliding windows) and beam search
are answered in batches of equal settings.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from clover.core.errors import CloverError
from clover.language.constraint import CompiledSchema, Schema, SchemaCompiler
from clover.language.decoder_only import DecoderOnly
from clover.language.frozen import FrozenLanguage
from clover.language.generation import next_token
from clover.language.rows import RowBatch, can_share_a_batch
from clover.serve.kept import FeatureStore, KeptPrompt, PromptStore, Symbol, shared_length
from clover.serve.request import Begun, BusyError, Event, Picture, Question, Served, Ticket
from clover.serve.row import Row, fresh_writing, may_go_on, rows_of
from clover.serve.settings import ServeSettings
from clover.serve.writing import Piece, score

Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)
_PASS_TOKENS_CPU, _PASS_TOKENS_DEVICE = 256, 2048
"""Prompt tokens read between two steps: the rows that are writing wait for so long."""
_NOTES = 10_000
"""Images whose notes are remembered."""
_WORTHWHILE = 8
"""A row waits for its neighbour's prompt when that saves it so many tokens."""


@dataclass
class Counts:
    """What the engine did since it began; read by `/metrics`."""

    answers: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    written_tokens: int = 0
    encoded_images: int = 0
    reused_images: int = 0
    steps: int = 0
    step_rows: int = 0
    answer_seconds: float = 0.0


class Engine:
    """Answers questions.

    Args:
        models: What is served; all share one language model.
        settings: Limits.

    Raises:
        CloverError: two models of one name, or of different language models.
    """

    def __init__(self, models: Sequence[Served], settings: ServeSettings) -> None:
        names = [served.name for served in models]
        for name in names:
            if names.count(name) > 1:
                raise CloverError(
                    f"two models are called '{name}'; name them, for instance "
                    "clover serve first=FOLDER second=FOLDER"
                )
        transformers = {id(served.language.model) for served in models}
        if len(transformers) != 1:
            raise CloverError("the models stand on different language models; serve them apart")
        self.models: Mapping[str, Served] = {served.name: served for served in models}
        self.settings = settings
        self.counts = Counts()
        self.features = FeatureStore(settings.feature_bytes)
        self.prompts = PromptStore(settings.prefix_bytes)
        self._language: FrozenLanguage = models[0].language
        first = models[0].clover
        self._autocast = contextlib.nullcontext if first is None else first.device.autocast
        self._batch: RowBatch | None = None
        if can_share_a_batch(self._language):
            assert isinstance(self._language, DecoderOnly)
            self._batch = RowBatch(self._language, settings.max_batch)
        self._held: dict[tuple[Symbol, ...], int] = {}
        """Constant beginnings by the number under which the batch holds them."""
        self._notes: dict[tuple[str, str], str | None] = {}
        """On images by model and SHA-256."""
        self._rows: list[Row] = []
        self._waiting: list[Row] = []
        self._compiler: SchemaCompiler | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | Ticket | None] = queue.SimpleQueue()
        self._num_waiting, self._lock = 0, threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="clover-engine", daemon=True)
        self._thread.start()
        try:
            self.call(self._read_constants).result()
        except BaseException:
            self.close()  # or Python would end with a thread inside torch, after Ctrl-C: by a crash
            raise

    # -- from any thread ------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Answers that are being written."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Answers that wait for a place."""
        return self._num_waiting

    def submit(self, question: Question, emit: Callable[[Event], None]) -> Ticket:
        """Queue a question.

        Args:
            question: What is asked.
            emit: Called from the engine's thread with each event.

        Raises:
            BusyError: too many wait.
        """
        count = len(question.seeds)
        with self._lock:
            if self._num_waiting + count > self.settings.max_waiting:
                self.counts.refused += 1
                raise BusyError(
                    f"{self._num_waiting} answers wait, at most {self.settings.max_waiting} may; "
                    "come again later",
                    self._retry_after(),
                )
            self._num_waiting += count
        ticket = Ticket(question, emit)
        self._inbox.put(ticket)
        return ticket

    def call(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run a function in the engine's thread, between two steps; return its future."""
        future: Future[Result] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)

        self._inbox.put(run)
        return future

    def kept_features(self, served: Served, sha256: str) -> Tensor | None:
        """Return an image's features if they are kept: it then need not even be decoded."""
        return self.features.get(served.encoder_key(sha256))

    def compile_schema(self, schema: Schema) -> Future[CompiledSchema]:
        """Return a JSON schema in the form that answers are held to."""

        def work() -> CompiledSchema:
            if self._compiler is None:
                size = self._language.vocabulary_size
                self._compiler = SchemaCompiler(self._language.tokens, size)
            return self._compiler.compile(schema)

        return self.call(work)

    def prompt_embeds(self, question: Question) -> Tensor:
        """Return a whole prompt as the language model reads it `[T, H]`; for `call`.

        Raises:
            CloverError: it is longer than the model's limit.
        """
        row = rows_of(Ticket(question, lambda _: None), self.models[question.model])[0]
        has_picture = question.picture is not None
        visual = self._prefixes(row.served, [question])[0] if has_picture else None
        return self._embeds(row, 0, visual)

    def close(self) -> None:
        """Give up what is running or waiting, and end the thread."""
        if not self._is_closed:
            self._is_closed = True
            self._inbox.put(None)
            self._thread.join()

    def _retry_after(self) -> int:
        """Return in how many seconds the waiting answers will have found a place, roughly."""
        each = self.counts.answer_seconds / self.counts.answers if self.counts.answers else 1.0
        return max(1, min(60, round(each * self._num_waiting / self.settings.max_batch)))

    # -- in the engine's thread -----------------------------------------------------------

    @torch.no_grad()
    def _work(self) -> None:
        with self._autocast():
            while self._receive():
                try:
                    self._forget_cancelled()
                    self._admit()
                    if self._rows:
                        self._step()
                except Exception as error:
                    # This is the only thread that answers: it must outlive whatever went wrong.
                    self._start_over(error, self._waiting)
                    self._no_longer_waiting(len(self._waiting))
                    self._waiting = []
        for row in (*self._rows, *self._waiting):
            row.ticket.emit(CloverError("the server is shutting down"))
        self._rows, self._waiting = [], []

    def _receive(self) -> bool:
        """Take in what has come, waiting when there is nothing to do; return False at the end."""
        while True:
            is_idle = not self._rows and not self._waiting
            try:
                item = self._inbox.get(block=is_idle)
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, Ticket):
                self._take(item)
            else:
                item()

    def _take(self, ticket: Ticket) -> None:
        """Make rows of a request; a mistake in it is its own answer."""
        try:
            self._waiting += rows_of(ticket, self.models[ticket.question.model])
        except Exception as error:
            with self._lock:
                self._num_waiting -= len(ticket.question.seeds)
            self._fail(ticket, error)

    def _forget_cancelled(self) -> None:
        for place in reversed(range(len(self._rows))):
            if self._rows[place].ticket.is_cancelled:
                self.counts.cancelled += 1
                self._leave(place)
        kept = [row for row in self._waiting if not row.ticket.is_cancelled]
        self._no_longer_waiting(len(self._waiting) - len(kept))
        self.counts.cancelled += len(self._waiting) - len(kept)
        self._waiting = kept

    def _no_longer_waiting(self, count: int) -> None:
        with self._lock:
            self._num_waiting -= count

    def _admit(self) -> None:
        """Give waiting rows the free places, first come first served."""
        if not self._waiting:
            return
        first = self._waiting[0]
        if self._batch is None or first.question.settings.num_beams > 1:
            # What cannot share a batch waits until the others have ended, and then has it alone.
            if not self._rows:
                self._answer_alike(first)
            return
        group, plans = self._next_group()
        if not group:
            return
        self._waiting = [row for row in self._waiting if row not in group]
        self._no_longer_waiting(len(group))
        try:
            self._read(group, plans)
        except Exception as error:
            if len(group) == 1:
                self._fail(group[0].ticket, error)
                return
            # One bad request must not fail its neighbours.
            for row, plan in zip(group, plans, strict=True):
                try:
                    self._read([row], [plan])
                except Exception as own:
                    self._fail(row.ticket, own)

    def _next_group(self) -> tuple[list[Row], list[tuple[KeptPrompt | None, int]]]:
        """Return rows to read in one pass, each with the kept prompt it begins with."""
        group: list[Row] = []
        plans: list[tuple[KeptPrompt | None, int]] = []
        on_cpu = self._language.device.type == "cpu"
        budget = _PASS_TOKENS_CPU if on_cpu else _PASS_TOKENS_DEVICE
        for row in self._waiting[: self.settings.max_batch]:
            if len(self._rows) + len(group) == self.settings.max_batch:
                break
            if row.question.settings.num_beams > 1:
                break
            if not self._has_room_for([*self._rows, *group, row]):
                break
            kept, shared = self.prompts.find(row.symbols)
            shared = min(shared, len(row.symbols) - 1)  # the last place gives the first logits
            if any(
                shared_length(row.symbols, other.symbols) >= shared + _WORTHWHILE for other in group
            ):
                continue  # in the next pass it begins where this neighbour's prompt ends
            budget -= len(row.symbols) - shared
            if group and budget < 0:
                break
            group.append(row)
            plans.append((kept, shared))
        return group, plans

    def _has_room_for(self, rows: Sequence[Row]) -> bool:
        """Return whether the rows' keys and values stay within bounds; one row alone always may."""
        config = self._language.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        token_bytes = 2 * config.num_hidden_layers * heads * width * self._language.dtype.itemsize
        longest = max(len(row.symbols) + row.question.settings.max_tokens for row in rows)
        needed = len(rows) * longest * token_bytes
        return len(rows) == 1 or needed <= self.settings.row_bytes

    def _read(self, group: list[Row], plans: list[tuple[KeptPrompt | None, int]]) -> None:
        """Read the prompts of new rows as one pass, and write their first tokens."""
        assert self._batch is not None, "only rows that share a batch are read"
        visual = self._visual(group, plans)
        rest = [
            self._embeds(row, shared, seen)
            for row, (_, shared), seen in zip(group, plans, visual, strict=True)
        ]
        begun, bases = [], []
        for kept, shared in plans:
            parts = [] if kept is None else kept.beginning(shared)
            base = None if kept is None else self._held.get(kept.constant(shared))
            # What the batch holds once for all rows is not copied into this one's slot.
            begun.append(parts if base is None else parts[1:])
            bases.append(base)
        notes = [self.note_of(row.question) for row in group]
        first = len(self._rows)
        logits = self._batch.admit(begun, rest, bases)
        self._rows += group
        try:
            for place, (row, (_, shared)) in enumerate(zip(group, plans, strict=True), start=first):
                row.base = self.prompts.base(row.symbols)
                if shared < len(row.symbols) - 1:
                    self._keep(place, len(row.symbols))
        except Exception:
            # Rows without a first token must not stay: the next step would ask for their last one.
            for place in reversed(range(first, len(self._rows))):
                self._batch.remove(place)
            del self._rows[first:]
            raise
        for row, (_, shared), note in zip(group, plans, notes, strict=True):
            self.counts.prompt_tokens += len(row.symbols)
            self.counts.reused_tokens += shared
            row.ticket.emit(Begun(len(row.symbols), shared, note))
        self._write(logits, range(first, len(self._rows)))

    def _keep(self, place: int, length: int) -> None:
        """Keep what a row has read, for prompts that begin alike."""
        assert self._batch is not None, "only rows of the batch are kept"
        row = self._rows[place]
        start = 0 if row.base is None else len(row.base.symbols)
        symbols = [*row.symbols, *row.writing.ids][:length]
        self.prompts.put(symbols, row.base, self._batch.copy_out(place, start, length))

    def _visual(
        self, group: list[Row], plans: list[tuple[KeptPrompt | None, int]]
    ) -> list[Tensor | None]:
        """Return the visual tokens `[Q, H]` of the rows that have still to read them."""
        found: list[Tensor | None] = [None] * len(group)
        by_model: dict[str, list[int]] = {}
        for index, (row, (_, shared)) in enumerate(zip(group, plans, strict=True)):
            end = len(row.symbols) - len(row.prompt_ids)
            if row.question.picture is not None and shared < end:
                by_model.setdefault(row.served.name, []).append(index)
        for name, indices in by_model.items():
            rows = [group[index] for index in indices]
            prefixes = self._prefixes(self.models[name], [row.question for row in rows])
            for index, prefix in zip(indices, prefixes, strict=True):
                found[index] = prefix
        return found

    def _prefixes(self, served: Served, questions: Sequence[Question]) -> Tensor:
        clover = served.clover
        assert clover is not None, "only a model that sees is asked about pictures"
        pictures = [question.picture for question in questions if question.picture is not None]
        features = torch.cat([self.features_of(served, picture) for picture in pictures])
        clover.bridge.eval()
        with clover.device.autocast():
            return clover.visual_prefix(features, [question.question for question in questions])

    def features_of(self, served: Served, picture: Picture) -> Tensor:
        """Return an image's tokens `[1, P, E]`, encoded at most once; for `call`."""
        clover = served.clover
        assert clover is not None, "only a model that sees has features"
        key = served.encoder_key(picture.sha256)
        kept = picture.features if picture.features is not None else self.features.get(key)
        if kept is not None:
            self.counts.reused_images += 1
            return kept
        assert picture.pixels is not None, "a picture has pixels or features"
        # One by one: kept features must not depend on which images came together.
        features = clover.encoder.encode(picture.pixels[None]).float()
        self.counts.encoded_images += 1
        self.features.put(key, features)
        return features

    def note_of(self, question: Question) -> str | None:
        """Return what is to be said of a question's image; for `call`."""
        served, picture = self.models[question.model], question.picture
        if picture is None or served.clover is None or served.clover.familiarity is None:
            return None
        key = (served.name, picture.sha256)
        if key not in self._notes:
            if len(self._notes) >= _NOTES:
                self._notes.clear()
            self._notes[key] = served.clover.note_on(self.features_of(served, picture))
        return self._notes[key]

    def _embeds(self, row: Row, shared: int, visual: Tensor | None) -> Tensor:
        """Return the embeddings `[T, H]` of a row's prompt from place `shared` on."""
        language = row.served.language
        words = language.word_embeddings(torch.tensor(row.prompt_ids, device=language.device))
        before = len(row.symbols) - len(row.prompt_ids)
        if shared >= before:
            return words[shared - before :]
        if visual is None:
            return words
        constant = language.word_embeddings(
            torch.tensor(list(language.prefix_ids), dtype=torch.long, device=language.device)
        )
        whole = [constant, visual.to(words.device, words.dtype), words]
        return torch.cat(whole)[shared:]

    def _step(self) -> None:
        assert self._batch is not None, "rows only stand in the batch"
        self.counts.steps += 1
        self.counts.step_rows += len(self._rows)
        try:
            logits = self._batch.step([row.writing.ids[-1] for row in self._rows])
        except Exception as error:
            self._start_over(error)
            return
        self._write(logits, range(len(self._rows)))

    def _start_over(self, error: Exception, more: Sequence[Row] = ()) -> None:
        """Fail the answers being written, and `more`, and go on with a batch of nobody."""
        for row in (*self._rows, *more):
            if row.writing.finish_reason is None:
                self._fail(row.ticket, error)
        self._rows = []
        if self._batch is None:
            return
        assert isinstance(self._language, DecoderOnly), "it has a batch"
        self._batch = RowBatch(self._language, self.settings.max_batch)
        keys, self._held = list(self._held), {}
        try:
            self._held = {key: self._batch.hold(self.prompts.constant(key)) for key in keys}
        except Exception:
            _LOG.exception("constant texts cannot be held once; every answer copies its own")
            self._batch = RowBatch(self._language, self.settings.max_batch)

    def _write(self, logits: Tensor, places: Sequence[int]) -> None:
        """Write the next token of the rows at `places`; those that end leave."""
        ended = []
        for index, place in enumerate(places):
            row = self._rows[place]
            try:
                self._write_row(row, logits[index])
            except Exception as error:
                self._fail(row.ticket, error)
                ended.append(place)
                continue
            if row.writing.finish_reason is not None:
                self.counts.answers += 1
                self.counts.answer_seconds += time.monotonic() - row.arrived
                ended.append(place)
        try:
            for place in reversed(ended):
                self._leave(place)
        except Exception as error:
            self._start_over(error)  # the batch may be torn between two rows

    def _write_row(self, row: Row, logits: Tensor) -> None:
        scores: tuple[Any, ...] = ()
        raw = logits.clone() if row.question.num_top is not None else logits
        token = next_token(
            logits,
            row.writing.ids,
            row.question.settings,
            row.generator,
            stop_ids=row.served.language.tokens.stop_ids,
            constraint=row.constraint,
        )
        if row.question.num_top is not None:
            scores = (score(raw, token, row.question.num_top, row.served.language.tokens),)
        text = row.writing.take(token)
        self.counts.written_tokens += 1
        row.ticket.emit(Piece(row.number, text, row.writing.finish_reason, scores))

    def _leave(self, place: int) -> None:
        """Free a row's place; the last row moves into it."""
        assert self._batch is not None, "rows only stand in the batch"
        row = self._rows[place]
        if may_go_on(row) and self._batch.lengths[place] > len(row.symbols):
            try:
                self._keep(place, self._batch.lengths[place])
            except Exception:
                # The answer is written; a later turn reads again what is not kept.
                _LOG.exception("an answer is not kept for the next turn")
        last = self._batch.remove(place)
        self._rows[place] = self._rows[last]
        self._rows.pop()

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self.counts.failed += 1
        if not isinstance(error, CloverError):
            _LOG.error("an answer failed", exc_info=error)
        ticket.cancel()
        ticket.emit(error)

    def _answer_alike(self, first: Row) -> None:
        """Answer waiting rows of one model and equal settings as a batch, from begin to end."""
        rows = [
            row
            for row in self._waiting
            if row.served is first.served
            and row.question.settings == first.question.settings
            and (row.question.picture is None) == (first.question.picture is None)
        ][: self.settings.max_batch]
        self._waiting = [row for row in self._waiting if row not in rows]
        self._no_longer_waiting(len(rows))
        try:
            self._generate(rows)
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0].ticket, error)
                return
            for row in rows:
                row.writing = fresh_writing(row.served, row.question)
                try:
                    self._generate([row])
                except Exception as own:
                    self._fail(row.ticket, own)

    def _generate(self, rows: list[Row]) -> None:
        first = rows[0]
        language, settings = first.served.language, first.question.settings
        has_picture = first.question.picture is not None
        visual = (
            self._prefixes(first.served, [row.question for row in rows]) if has_picture else None
        )
        prefix = language.prefix_ids if has_picture else ()
        prompts = [row.prompt_ids for row in rows]
        for row in rows:
            self.counts.prompt_tokens += len(row.symbols)
            row.ticket.emit(Begun(len(row.symbols), 0, self.note_of(row.question)))
        if settings.num_beams > 1:
            # The best beam is known only at the end: there is nothing to show before.
            written = language.generate_from_ids(visual, prompts, settings, prefix=prefix)
            for row, ids in zip(rows, written, strict=True):
                self._write_all(row, ids)
            return
        steps = language.steps(
            visual,
            prompts,
            settings,
            prefix=prefix,
            seeds=[row.question.seeds[row.number] % (1 << 63) for row in rows],
            constraints=[row.constraint for row in rows],
        )
        for pairs in steps:
            if all(row.ticket.is_cancelled for row in rows):
                return
            for index, token in pairs:
                self._write_all(rows[index], [token])

    def _write_all(self, row: Row, ids: Sequence[int]) -> None:
        """Append tokens that were chosen elsewhere, up to the answer's end."""
        texts, count = [], 0
        for token in ids:
            if row.writing.finish_reason is not None:
                break
            texts.append(row.writing.take(token))
            count += 1
        if count:
            self.counts.written_tokens += count
            ended = row.writing.finish_reason
            if ended is not None:
                self.counts.answers += 1
                self.counts.answer_seconds += time.monotonic() - row.arrived
            row.ticket.emit(Piece(row.number, "".join(texts), ended, (), count))

    def _read_constants(self) -> None:
        """Read the constant text before the image of every model, once."""
        if self._batch is None:
            return
        for ids in {served.language.prefix_ids for served in self.models.values() if served.clover}:
            if ids:
                words = self._language.word_embeddings(
                    torch.tensor(list(ids), device=self._language.device)
                )
                self._batch.admit([[]], [words])
                read = self._batch.copy_out(0, 0, len(ids))
                self.prompts.pin(ids, read)
                self._batch.remove(0)
                if self._batch.can_share:
                    self._held[tuple(ids)] = self._batch.hold(read)
