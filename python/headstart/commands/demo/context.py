"""`headstart demo context`: one long text, many questions, with transformers' attention and with headstart's.

SmolLM2-135M reads several thousand tokens of Python's help texts once. Questions about them are then answered from the
same keys and values: by transformers, which attends all of them for every token, and by headstart, which attends the
clusters that a token needs. Besides the times, how well each predicts what the text goes on with: the context is the
text's beginning, and the loss is that of the tokens after it, one at a time, as in decoding.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from pathlib import Path

import torch

from ..._environment import environment
from ..._files import write_whole
from ..texts import token_ids

TOKENS = 7680
CONTINUATION = 128
ANSWER = 24
SAMPLED = 8  # decoded tokens whose keys are counted
QUESTIONS = (
    "What does the assert statement do?",
    "How are the operators of Python ordered by precedence?",
    "What is the difference between a list and a tuple?",
    "When is the else clause of a for loop run?",
)
BASELINE = "transformers + SDPA"


@torch.inference_mode()
def run(
    tokens: int = TOKENS,
    report: str | Path = "demo-report",
    density: float | None = None,
    seed: int = 0,
) -> dict:
    """Runs the demo, prints its table, writes `report`/context.json, and returns what it holds.

    Args:
        tokens: of the context.
        density: as in `Context.cache`; its default if None.
    """
    from transformers import DynamicCache

    from ...attention.recording import record
    from ...context.context import DEFAULT_DENSITY, Context
    from ...model.load import SMOLLM2, load_model
    from ...model.patch import patch, unpatch
    from .. import console

    density = DEFAULT_DENSITY if density is None else density
    if type(tokens) is not int or not 64 <= tokens <= 8192 - CONTINUATION - 64:
        raise ValueError(f"demo: tokens: expected an integer from 64 to {8192 - CONTINUATION - 64}, got {tokens!r}")
    report = Path(report)
    report.mkdir(parents=True, exist_ok=True)
    rows = {}
    with console.progress() as progress:
        with progress.step("loading SmolLM2-135M", 1) as advance:
            model, tokenizer = load_model(SMOLLM2, dtype=torch.bfloat16, packed=False)
            text = token_ids(tokenizer)[None]
            ids, following = text[:, :tokens], text[:, tokens : tokens + CONTINUATION]
            questions = [_prompt(tokenizer, question) for question in QUESTIONS]
            advance()
        layers = model.config.num_hidden_layers
        with progress.step("reading, transformers", layers) as advance:
            start, hooks = (
                time.perf_counter(),
                [x.register_forward_hook(lambda *_: advance()) for x in model.model.layers],
            )
            own = DynamicCache()
            model(ids, past_key_values=own, logits_to_keep=1)
            own_reading = time.perf_counter() - start
            for hook in hooks:
                hook.remove()
        steps = len(questions) * ANSWER + CONTINUATION - 1
        with progress.step(BASELINE, steps) as advance:
            rows[BASELINE] = measure(model, lambda: copy.deepcopy(own), questions, following, advance)
        patch(model)
        with progress.step("reading, headstart", 2 * layers) as advance:
            start = time.perf_counter()
            context = Context.build(model, ids, seed=seed, advance=advance)
            reading = time.perf_counter() - start
        for name, share in (("headstart, all keys", 1.0), (f"headstart, {density:.0%} of keys", density)):
            cache = context.cache(density=share)

            def fresh(cache=cache):
                cache.reset()
                return cache

            with progress.step(name, steps) as advance:
                rows[name] = measure(model, fresh, questions, following, advance)
            with record() as entries:
                for position in range(0, CONTINUATION, CONTINUATION // SAMPLED):
                    model(following[:, position : position + 1], past_key_values=cache, logits_to_keep=1)
            rows[name]["keys"] = _keys_of_decoding(entries, context)
        unpatch(model)
    rows[BASELINE]["keys"] = 1.0
    content = {
        "tokens": tokens,
        "continuation": CONTINUATION,
        "questions": list(QUESTIONS),
        "question_tokens": [question.shape[1] for question in questions],
        "reading_seconds": {"transformers + SDPA": own_reading, "headstart, clustering included": reading},
        "context_mib": context.bytes / 2**20,
        "environment": environment(),
        "rows": rows,
    }
    write_whole(report / "context.json", lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
    _show(content, tokenizer, report / "context.json")
    return content


def _prompt(tokenizer, question: str) -> torch.Tensor:
    """What ends the text and asks about it, as the model was taught to be asked."""
    asked = [{"role": "user", "content": f"{question} Answer in one sentence, with what the text above says."}]
    return tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


def measure(model, fresh, questions, following, advance) -> dict:
    """Seconds to the first token of an answer and of each later one (medians over the questions), the answers, and the
    loss of the text that follows, a token at a time."""
    first, later, answers = [], [], []
    for question in questions:
        cache, tokens, times = fresh(), question, []
        for _ in range(ANSWER):
            start = time.perf_counter()
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - start)
            answers.append(tokens.item())
            advance()
        first.append(times[0])
        later += times[1:]
    cache, losses = fresh(), []
    for position in range(following.shape[1] - 1):
        logits = model(following[:, position : position + 1], past_key_values=cache).logits[:, -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, following[:, position + 1]).item())
        advance()
    return {
        "first_token_seconds": statistics.median(first),
        "token_seconds": statistics.median(later),
        "loss": statistics.fmean(losses),
        "answers": answers,
    }


def _keys_of_decoding(entries, context) -> float:
    """The share of the context's keys that a decoded token reads, in the mean over layers and heads, with the
    centroids, each of which is read like half of a key and value."""
    layer = context.layers[0]
    columns = [entry.index.column_count for entry in entries]
    if columns[0] is None:
        return 1.0
    keys = statistics.fmean(count.float().mean().item() for count in columns) + context.tokens - layer.clustered
    return (keys + layer.clusters.centroids.shape[1] / 2) / context.tokens


def _until_end(tokens: list[int], tokenizer) -> list[int]:
    return tokens[: tokens.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in tokens else tokens


def _show(content: dict, tokenizer, path: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Column, Table

    rows, console = content["rows"], Console()
    baseline, reading = rows[BASELINE], content["reading_seconds"]
    columns = ("first token", "tokens/s", "loss", "keys")
    table = Table(
        Column("attention", no_wrap=True),
        *(Column(title, justify="right", no_wrap=True) for title in columns),
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=f"{len(content['questions'])} questions about {content['tokens']:,} tokens, SmolLM2-135M",
        caption=f"loss of the {content['continuation']} tokens after the context, decoded one at a time",
    )
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['first_token_seconds']:.2f} s",
            f"{1 / row['token_seconds']:.1f} ({baseline['token_seconds'] / row['token_seconds']:.1f}x)",
            f"{row['loss']:.4f} ({row['loss'] - baseline['loss']:+.4f})",
            f"{row['keys']:.0%}",
        )
    console.print(table)
    *_, (name, best) = rows.items()
    for i, question in enumerate(content["questions"]):
        answer = tokenizer.decode(_until_end(best["answers"][i * ANSWER : (i + 1) * ANSWER], tokenizer))
        console.print(f"[bold]{question}[/bold] {' '.join(answer.split())}", highlight=False)
    seconds = reading["transformers + SDPA"]
    sooner = (seconds + baseline["first_token_seconds"]) / best["first_token_seconds"]
    length = statistics.median(content["question_tokens"])
    console.print(
        f"Reading the context takes {seconds:.1f} s with transformers + SDPA and "
        f"{reading['headstart, clustering included']:.1f} s with headstart, clustering included, once. The first token "
        f"of an answer, to a question of {length:.0f} tokens, comes {sooner:.0f}x "
        "sooner than if transformers read the text again.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
