"""What the server did, in Prometheus' text format."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clover.serve.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(engine: Engine, responses: dict[int, int]) -> str:
    """Return all figures.

    Args:
        engine: Whose counts.
        responses: How often each HTTP status was answered.
    """
    counts = engine.counts
    lines: list[str] = []

    def add(name: str, kind: str, text: str, values: dict[str, float]) -> None:
        lines.append(f"# HELP clover_{name} {text}")
        lines.append(f"# TYPE clover_{name} {kind}")
        lines.extend(f"clover_{name}{label} {_written(value)}" for label, value in values.items())

    statuses: dict[str, float] = {
        f'{{status="{status}"}}': count for status, count in sorted(responses.items())
    }
    add("http_responses_total", "counter", "HTTP responses by status.", statuses)
    ended: dict[str, float] = {
        '{result="answered"}': counts.answers,
        '{result="cancelled"}': counts.cancelled,
        '{result="failed"}': counts.failed,
        '{result="refused"}': counts.refused,
    }
    add("answers_total", "counter", "Answers by how they ended.", ended)
    add(
        "answer_seconds_total",
        "counter",
        "Seconds from question to end of answer, summed.",
        {"": counts.answer_seconds},
    )
    tokens: dict[str, float] = {
        '{kind="prompt"}': counts.prompt_tokens,
        '{kind="reused"}': counts.reused_tokens,
        '{kind="written"}': counts.written_tokens,
    }
    add("tokens_total", "counter", "Tokens of prompts, those reused, those written.", tokens)
    images: dict[str, float] = {
        '{kind="encoded"}': counts.encoded_images,
        '{kind="reused"}': counts.reused_images,
    }
    add("images_total", "counter", "Images encoded, and those whose features were kept.", images)
    add("steps_total", "counter", "Steps of the language model.", {"": counts.steps})
    add(
        "step_rows_total",
        "counter",
        "Answers written at these steps, summed.",
        {"": counts.step_rows},
    )
    add("running_answers", "gauge", "Answers being written.", {"": engine.num_running})
    add("waiting_answers", "gauge", "Answers that wait for a place.", {"": engine.num_waiting})
    add("kept_images", "gauge", "Images whose features are kept.", {"": len(engine.features)})
    add("kept_feature_bytes", "gauge", "Bytes of these.", {"": engine.features.num_bytes})
    add("kept_prompt_bytes", "gauge", "Bytes of kept prompts.", {"": engine.prompts.num_bytes})
    return "\n".join(lines) + "\n"


def _written(value: float) -> str:
    """Return a figure whole: a counter of eight digits that loses two stands still for long."""
    return str(value) if isinstance(value, int) else repr(round(value, 6))
