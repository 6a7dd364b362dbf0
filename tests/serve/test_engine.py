"""The engine against the unbatched model: the same answers, whoever else is asking."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny import Tiny, build_tiny, tiny_clover

from clover.core.errors import CloverError
from clover.core.files import sha256_file
from clover.language.protocol import GenerationSettings
from clover.model import Clover, load, open_image
from clover.serve.engine import Engine
from clover.serve.request import Begun, BusyError, Event, Picture, Question, Served
from clover.serve.settings import ServeSettings
from clover.serve.writing import Piece

QUESTIONS = [
    "which tissue is shown ?",
    "is there necrosis ?",
    "describe the image",
    "is this liver ?",
    "many cells or few ?",
]
LONG = GenerationSettings(max_tokens=12, min_tokens=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def clover(tiny: Tiny) -> Clover:
    return tiny_clover(tiny.recipe)


@pytest.fixture
def engine(clover: Clover) -> Iterator[Engine]:
    engine = Engine([Served("tiny", clover.language, clover)], ServeSettings(max_batch=4))
    yield engine
    engine.close()


def picture(clover: Clover, path: Path) -> Picture:
    return Picture(sha256_file(path), clover.encoder.prepare(open_image(path)))


class Listener:
    """Collects what a request is told."""

    def __init__(self, engine: Engine, question: Question) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.begun: Begun | None = None
        self.pieces: list[Piece] = []
        self.ticket = engine.submit(question, self.events.put)
        self._left = len(question.seeds)

    def texts(self) -> list[str]:
        texts = [""] * self._left
        left = self._left
        while left:
            event = self.events.get(timeout=60)
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Begun):
                self.begun = event
                continue
            self.pieces.append(event)
            texts[event.answer] += event.text
            left -= event.finish_reason is not None
        return [text.strip() for text in texts]


def ask(engine: Engine, clover: Clover, path: Path, text: str, **changes: object) -> Listener:
    question = Question("tiny", LONG, text, picture(clover, path))
    return Listener(engine, replace(question, **changes))  # type: ignore[arg-type]


def test_answers_in_company_are_those_of_the_model_alone(
    engine: Engine, clover: Clover, tiny: Tiny
) -> None:
    asked = [
        (tiny.image(tissue), text, replace(LONG, max_tokens=6 + index % 5))
        for tissue in ("liver", "colon", "kidney")
        for index, text in enumerate(QUESTIONS)
    ]
    listeners = [ask(engine, clover, path, text, settings=s) for path, text, s in asked]
    answers = [listener.texts()[0] for listener in listeners]
    assert answers == [clover.ask(path, text, settings=s).text for path, text, s in asked]
    assert engine.counts.step_rows / engine.counts.steps > 1.5
    assert len(set(answers)) > 3  # a model that says one thing would pass any of this


def test_an_image_is_encoded_once(engine: Engine, clover: Clover, tiny: Tiny) -> None:
    for text in QUESTIONS:
        ask(engine, clover, tiny.image(), text).texts()
    assert engine.counts.encoded_images == 1
    kept = engine.kept_features(engine.models["tiny"], sha256_file(tiny.image()))
    assert kept is not None
    torch.testing.assert_close(kept, clover.encode(tiny.image()), atol=0, rtol=0)
    without_pixels = Picture(sha256_file(tiny.image()), features=kept)
    listener = ask(engine, clover, tiny.image(), QUESTIONS[0], picture=without_pixels)
    assert listener.texts() == [clover.ask(tiny.image(), QUESTIONS[0], settings=LONG).text]


def test_a_conversation_is_that_of_the_terminal(engine: Engine, clover: Clover, tiny: Tiny) -> None:
    features = clover.encode(tiny.image())
    turns: list[tuple[str, str]] = []
    for text in QUESTIONS[:3]:
        expected = "".join(clover.stream(features, turns, text, settings=LONG)).strip()
        assert ask(engine, clover, tiny.image(), text, turns=tuple(turns)).texts() == [expected]
        turns.append((text, expected))


def test_only_the_constant_text_is_reused_when_the_question_is_another(
    engine: Engine, clover: Clover, tiny: Tiny
) -> None:
    constant = len(clover.language.prefix_ids)  # type: ignore[attr-defined]
    first = ask(engine, clover, tiny.image(), QUESTIONS[0])
    first.texts()
    other = ask(engine, clover, tiny.image(), QUESTIONS[1])
    other.texts()
    again = ask(engine, clover, tiny.image(), QUESTIONS[0])
    assert again.texts() == [clover.ask(tiny.image(), QUESTIONS[0], settings=LONG).text]
    assert first.begun is not None and other.begun is not None and again.begun is not None
    assert (first.begun.reused_tokens, other.begun.reused_tokens) == (constant, constant)
    assert again.begun.reused_tokens == again.begun.prompt_tokens - 1


def test_a_q_former_that_reads_no_question_lets_a_conversation_go_on_where_it_stood(
    tiny: Tiny,
) -> None:
    tune = tiny.recipe.tune.model_copy(update={"instruction_aware": False})
    clover = tiny_clover(tiny.recipe.model_copy(update={"tune": tune}))
    engine = Engine([Served("tiny", clover.language, clover)], ServeSettings())
    features = clover.encode(tiny.image())
    turns: list[tuple[str, str]] = []
    reused = []
    for text in QUESTIONS[:3]:
        listener = ask(engine, clover, tiny.image(), text, turns=tuple(turns))
        answer = listener.texts()[0]
        assert answer == "".join(clover.stream(features, turns, text, settings=LONG)).strip()
        turns.append((text, answer))
        assert listener.begun is not None
        reused.append(listener.begun)
    # All of the earlier turn's prompt but for its answer's last word, which no pass has read.
    assert reused[1].reused_tokens >= reused[0].prompt_tokens
    assert reused[2].reused_tokens >= reused[1].prompt_tokens
    engine.close()


def test_several_answers_share_one_reading_and_differ_by_seed(
    engine: Engine, clover: Clover, tiny: Tiny
) -> None:
    warm = replace(LONG, temperature=1.5)
    both = ask(engine, clover, tiny.image(), QUESTIONS[2], settings=warm, seeds=(1, 2, 1))
    texts = both.texts()
    assert texts[0] == texts[2] != texts[1]
    alone = clover.ask(tiny.image(), QUESTIONS[2], settings=replace(warm, seed=2)).text
    assert texts[1] == alone
    assert engine.counts.encoded_images == 1


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(
    engine: Engine, clover: Clover, tiny: Tiny
) -> None:
    whole = clover.ask(tiny.image(), QUESTIONS[2], settings=LONG).text
    stop = " ".join(whole.split()[3:5])
    listener = ask(engine, clover, tiny.image(), QUESTIONS[2], stops=(stop,))
    assert listener.texts() == [whole[: whole.index(stop)].strip()]
    assert listener.pieces[-1].finish_reason == "stop"
    assert len(listener.pieces) < 12


def test_scores_are_log_probabilities_of_the_written_tokens(
    engine: Engine, clover: Clover, tiny: Tiny
) -> None:
    listener = ask(engine, clover, tiny.image(), QUESTIONS[0], num_top=3)
    listener.texts()
    prefix = clover.visual_prefix(clover.encode(tiny.image()), [QUESTIONS[0]])
    with torch.no_grad():
        logits, _ = clover.language._begin(  # type: ignore[attr-defined]
            prefix,
            [clover.language.instruction_ids(QUESTIONS[0])],  # type: ignore[attr-defined]
            clover.language.prefix_ids,  # type: ignore[attr-defined]
            1,
        )
    expected = logits[0].log_softmax(-1).topk(3).values.tolist()
    first = listener.pieces[0].scores[0]
    assert [value for _, value in first.top] == pytest.approx(expected, abs=1e-4)
    assert all(score.logprob <= 0 for piece in listener.pieces for score in piece.scores)


def test_a_full_queue_refuses_and_says_when_to_come_again(clover: Clover, tiny: Tiny) -> None:
    engine = Engine([Served("tiny", clover.language, clover)], ServeSettings(max_waiting=3))
    gate: queue.SimpleQueue[None] = queue.SimpleQueue()
    blocked = engine.call(gate.get)
    listeners = [ask(engine, clover, tiny.image(), text) for text in QUESTIONS[:3]]
    with pytest.raises(BusyError, match="3 answers wait, at most 3 may") as refused:
        ask(engine, clover, tiny.image(), QUESTIONS[3])
    assert refused.value.retry_after >= 1
    gate.put(None)
    blocked.result(timeout=10)
    assert all(listener.texts()[0] for listener in listeners)
    assert ask(engine, clover, tiny.image(), QUESTIONS[3]).texts()
    assert engine.num_waiting == 0
    engine.close()


def test_rows_wait_for_room_when_memory_is_bounded(clover: Clover, tiny: Tiny) -> None:
    # Two layers of two key heads of width 8 in float32: 256 bytes a token, some 23 tokens a row.
    settings = ServeSettings(row_bytes=256 * 50)
    engine = Engine([Served("tiny", clover.language, clover)], settings)
    gate: queue.SimpleQueue[None] = queue.SimpleQueue()
    engine.call(gate.get)
    listeners = [ask(engine, clover, tiny.image(), text) for text in QUESTIONS]
    gate.put(None)
    for listener, text in zip(listeners, QUESTIONS, strict=True):
        assert listener.texts() == [clover.ask(tiny.image(), text, settings=LONG).text]
    assert engine.counts.step_rows <= 2 * engine.counts.steps
    assert engine.counts.step_rows > engine.counts.steps
    engine.close()


def test_who_leaves_is_not_written_for(engine: Engine, clover: Clover, tiny: Tiny) -> None:
    endless = GenerationSettings(max_tokens=100, min_tokens=100)
    gone = ask(engine, clover, tiny.image(), QUESTIONS[0], settings=endless)
    while not isinstance(gone.events.get(timeout=30), Piece):
        pass
    gone.ticket.cancel()
    assert ask(engine, clover, tiny.image(), QUESTIONS[1]).texts()
    engine.call(lambda: None).result(timeout=30)  # the last piece is told before its row leaves
    assert engine.num_running == 0
    assert engine.counts.cancelled == 1
    assert engine.counts.written_tokens < 100


def test_one_bad_request_does_not_fail_its_neighbours(
    engine: Engine, clover: Clover, tiny: Tiny
) -> None:
    gate: queue.SimpleQueue[None] = queue.SimpleQueue()
    engine.call(gate.get)
    good = ask(engine, clover, tiny.image(), QUESTIONS[0])
    too_long = ask(engine, clover, tiny.image(), "a", settings=GenerationSettings(max_tokens=1000))
    broken = ask(engine, clover, tiny.image(), "b", picture=Picture("x", torch.zeros(3, 5, 5)))
    other = ask(engine, clover, tiny.image("colon"), QUESTIONS[0])
    gate.put(None)
    assert good.texts() == [clover.ask(tiny.image(), QUESTIONS[0], settings=LONG).text]
    assert other.texts() == [clover.ask(tiny.image("colon"), QUESTIONS[0], settings=LONG).text]
    with pytest.raises(CloverError, match="more than the model's 256"):
        too_long.texts()
    with pytest.raises(Exception):  # noqa: B017  whatever the encoder says of such pixels
        broken.texts()


def test_a_fault_between_reading_and_writing_leaves_no_row_behind(
    engine: Engine, clover: Clover, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, calls = engine._keep, []

    def fail_once(place: int, length: int) -> None:
        calls.append(place)
        if len(calls) == 2:  # the first of two rows is kept already
            raise RuntimeError("no memory for what was read")
        keep(place, length)

    monkeypatch.setattr(engine, "_keep", fail_once)
    gate: queue.SimpleQueue[None] = queue.SimpleQueue()
    engine.call(gate.get)
    asked = [ask(engine, clover, tiny.image(), text) for text in QUESTIONS[:2]]
    gate.put(None)
    # Both are read again, each on its own, and answered.
    assert [listener.texts()[0] for listener in asked] == [
        clover.ask(tiny.image(), text, settings=LONG).text for text in QUESTIONS[:2]
    ]
    assert len(calls) > 2


def test_what_cannot_be_kept_costs_no_answer_and_no_engine(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = tiny.recipe.tune.model_copy(update={"instruction_aware": False})
    clover = tiny_clover(tiny.recipe.model_copy(update={"tune": tune}))
    engine = Engine([Served("tiny", clover.language, clover)], ServeSettings())
    keep = engine._keep

    def fail_at_the_end(place: int, length: int) -> None:
        if length > len(engine._rows[place].symbols):
            raise RuntimeError("no memory for what was written")
        keep(place, length)

    monkeypatch.setattr(engine, "_keep", fail_at_the_end)
    for text in QUESTIONS[:3]:
        expected = clover.ask(tiny.image(), text, settings=LONG).text
        assert ask(engine, clover, tiny.image(), text).texts() == [expected]
    assert engine.counts.failed == 0
    engine.close()


@pytest.mark.parametrize("method", ["remove", "step"])
def test_a_torn_batch_fails_who_stands_in_it_and_the_next_are_answered(
    clover: Clover, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    engine = Engine([Served("tiny", clover.language, clover)], ServeSettings())

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine._batch, method, fail)
    gate: queue.SimpleQueue[None] = queue.SimpleQueue()
    engine.call(gate.get)
    short = ask(engine, clover, tiny.image(), QUESTIONS[0], settings=replace(LONG, max_tokens=4))
    long = ask(engine, clover, tiny.image(), QUESTIONS[1])
    gate.put(None)
    with pytest.raises(RuntimeError, match="no memory"):
        long.texts()
    if method == "remove":  # the batch tore when this one was written to its end
        assert len(short.texts()[0].split()) == 4
    expected = clover.ask(tiny.image(), QUESTIONS[2], settings=LONG).text
    assert ask(engine, clover, tiny.image(), QUESTIONS[2]).texts() == [expected]
    engine.call(lambda: None).result(timeout=30)  # the last piece is told before its row leaves
    assert engine.num_running == engine.num_waiting == 0
    assert engine.counts.failed == (1 if method == "remove" else 2)
    engine.close()


def test_a_fault_among_the_waiting_fails_them_and_the_engine_lives(
    engine: Engine, clover: Clover, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def fail(*_: object) -> None:
            raise RuntimeError("no memory")

        patched.setattr(engine, "_next_group", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            ask(engine, clover, tiny.image(), QUESTIONS[0]).texts()
    expected = clover.ask(tiny.image(), QUESTIONS[2], settings=LONG).text
    assert ask(engine, clover, tiny.image(), QUESTIONS[2]).texts() == [expected]
    assert engine.num_waiting == 0


def test_beam_search_answers_as_alone(engine: Engine, clover: Clover, tiny: Tiny) -> None:
    beams = replace(LONG, num_beams=3)
    listeners = [ask(engine, clover, tiny.image(), text, settings=beams) for text in QUESTIONS]
    expected = [clover.ask(tiny.image(), text, settings=beams).text for text in QUESTIONS]
    assert [listener.texts()[0] for listener in listeners] == expected


def test_a_second_adapter_costs_its_bridge_alone(
    clover: Clover, tiny: Tiny, tmp_path: Path
) -> None:
    prompt = tiny.recipe.prompt.model_copy(
        update={"template": "<user> image {image}{question} <assistant>"}
    )
    second = tiny_clover(tiny.recipe.model_copy(update={"prompt": prompt, "seed": 5}))
    paths = [clover.save(tmp_path / "first"), second.save(tmp_path / "second")]
    first = load(paths[0], device="cpu", precision="float32")
    other = load(paths[1], device="cpu", precision="float32", beside=first)
    assert other.encoder is first.encoder
    assert other.language.model is first.language.model  # type: ignore[attr-defined]
    shared = {id(item) for item in first.language.model.parameters()}  # type: ignore[attr-defined]
    shared |= {id(item) for item in first.bridge.parameters()}
    own = {id(item) for item in other.bridge.parameters()}
    assert not own & shared
    served = [Served("a", first.language, first), Served("b", other.language, other)]  # type: ignore[arg-type]
    engine = Engine(served, ServeSettings())
    listeners = [
        ask(engine, first, tiny.image(), text, model=name) for text in QUESTIONS for name in "ab"
    ]
    expected = [
        model.ask(tiny.image(), text, settings=LONG).text
        for text in QUESTIONS
        for model in (first, second)
    ]
    assert [listener.texts()[0] for listener in listeners] == expected
    assert engine.counts.encoded_images == 1
    assert engine.counts.step_rows > engine.counts.steps
    engine.close()


def test_models_that_do_not_belong_together_are_refused(clover: Clover, tiny: Tiny) -> None:
    other = tiny_clover(tiny.recipe)
    with pytest.raises(CloverError, match="different language models"):
        Engine(
            [Served("a", clover.language, clover), Served("b", other.language, other)],
            ServeSettings(),
        )
    with pytest.raises(CloverError, match="two models are called 'a'"):
        Engine([Served("a", clover.language, clover)] * 2, ServeSettings())
