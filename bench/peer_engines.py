"""The engines that `peers.py` compares, and the process that measures one of them.

Each engine has the same methods: `__init__` imports what it needs, `open` opens the model's file, `prefill` reads a
prompt, `decode` generates after it, and `loss` says how well the prompt was predicted. headstart and transformers run
under the Python of `.venv`, the others under that of `.venv-peers`, so nothing of either is imported at the top.

``python bench/peer_engines.py ENGINE`` takes a request as JSON from standard input. It writes a line of JSON as soon as
it knows something: ``{"doing": ...}`` before a figure is measured, ``{"figure": ..., "value": ...}`` after it or
``{"failure": ...}`` instead of it, ``{"versions": ...}``, and ``{"note": ...}``.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

FIRST_PROMPT = 16  # tokens
WARM_UP = (256, 4)  # tokens that are read and generated before anything is timed
XATTENTION_THRESHOLD = 0.8


class Engine:
    """What all engines have in common. `prefill` must be called before `decode`."""

    packages: tuple[str, ...] = ()  # whose versions are reported
    longest = 8192  # tokens of a prompt
    note: str | None = None  # what a reader of the figures must know

    def open(self, file: str) -> None:
        raise NotImplementedError

    def prefill(self, ids: list[int]) -> None:
        """Reads a prompt as far as the first token after it, with nothing kept of what was read before."""
        raise NotImplementedError

    def decode(self, new: int) -> float:
        """The seconds that `new` more tokens take, likeliest ones, whatever they are."""
        raise NotImplementedError

    def loss(self, ids: list[int]) -> float | None:
        """The mean loss (nats) of the last half of the tokens; None if the engine gives no log-probabilities."""
        return None


# --- headstart and transformers --------------------------------------------------------------------------------------


class Transformers(Engine):
    """transformers with its SDPA attention. The weights become plain ones, as transformers opens GGUF."""

    packages = ("torch", "transformers")
    note = "headstart opens the file; transformers' own reader takes longer"

    def __init__(self, threads: int, dtype: str = "bfloat16"):
        import gguf  # noqa: F401  what opening would import otherwise
        import torch
        import transformers
        import transformers.models.llama.modeling_llama

        import headstart
        import headstart.attention.attach

        torch.set_num_threads(threads)
        self.torch, self.transformers, self.headstart = torch, transformers, headstart
        self.dtype = getattr(torch, dtype)

    def open(self, file: str) -> None:
        self.model = self.headstart.load(file, packed=False, dtype=self.dtype)
        self._accept_all_tokens()

    def _accept_all_tokens(self) -> None:
        self.model.generation_config.eos_token_id = None

    def prefill(self, ids: list[int]) -> None:
        self.cache = None  # frees the memory of the one before
        self.cache = self.transformers.DynamicCache(config=self.model.config)
        self.ids = self._generate(self.torch.tensor([ids]), 1)

    def decode(self, new: int) -> float:
        start = time.perf_counter()
        self.ids = self._generate(self.ids, new)
        return time.perf_counter() - start

    def _generate(self, ids, new: int):
        return self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            past_key_values=self.cache,
            max_new_tokens=new,
            do_sample=False,
        )

    def loss(self, ids: list[int]) -> float:
        from headstart.commands.demo import mean_loss

        return mean_loss(self.model, self.torch.tensor([ids]))


class Headstart(Transformers):
    """A patched model; the weights stay packed. `prefill` of a "plan" is the searched plan of the demo."""

    note = None

    def __init__(self, threads: int, prefill: str = "dense", int8_activations: bool = False):
        super().__init__(threads)
        self.pattern, self.int8_activations = prefill, int8_activations

    def open(self, file: str) -> None:
        from headstart.commands.demo.model import searched_plan

        plan = searched_plan() if self.pattern == "plan" else self.pattern
        model = self.headstart.load(file, dtype=self.dtype)
        self.model = self.headstart.patch(model, plan, int8_activations=self.int8_activations)
        self._accept_all_tokens()


# --- OpenVINO GenAI --------------------------------------------------------------------------------------------------


class OpenVino(Engine):
    """OpenVINO GenAI opens the GGUF file itself. Its pipeline is stepped by hand: the first step reads the prompt."""

    packages = ("openvino-genai", "openvino")

    def __init__(self, threads: int, xattention: bool = False):
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai = numpy, openvino, openvino_genai
        self.threads, self.xattention = threads, xattention

    def open(self, file: str) -> None:
        scheduler = self.genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 16384  # else it reads 256 tokens at once
        if self.xattention:
            scheduler.use_sparse_attention = True
            scheduler.sparse_attention_config = self.genai.SparseAttentionConfig(
                mode=self.genai.SparseAttentionMode.XATTENTION, xattention_threshold=XATTENTION_THRESHOLD
            )
        properties = {"INFERENCE_NUM_THREADS": self.threads}
        self.pipeline, self.request = self.genai.ContinuousBatchingPipeline(file, scheduler, "CPU", properties), None

    def prefill(self, ids: list[int]) -> None:
        self._stop()
        self.request = self._add(ids, max_new_tokens=1024, ignore_eos=True)
        self.pipeline.step()

    def decode(self, new: int) -> float:
        start = time.perf_counter()
        for _ in range(new):
            self.pipeline.step()
        return time.perf_counter() - start

    def loss(self, ids: list[int]) -> float:
        self._stop()
        request = self._add(ids, max_new_tokens=1, echo=True, logprobs=1)
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        logs = list(request.read_all()[0].generated_log_probs)[: len(ids)]
        return -sum(logs[len(ids) - len(ids) // 2 :]) / (len(ids) // 2)

    def _add(self, ids: list[int], **settings):
        config = self.genai.GenerationConfig()
        for name, value in (settings | {"do_sample": False}).items():
            setattr(config, name, value)
        return self.pipeline.add_request(0, self.openvino.Tensor(self.numpy.array([ids], dtype="int64")), config)

    def _stop(self) -> None:
        """Ends the request before, of which `decode` took only a part."""
        if self.request is not None:
            self.request.stop()
            while self.pipeline.has_non_finished_requests():
                self.pipeline.step()
            self.request = None


# --- llama.cpp and its fork ------------------------------------------------------------------------------------------


class IkLlama(Engine):
    """ik_llama.cpp with flash attention, through its C functions.

    Its Python class turns flash attention off without AVX-VNNI, and copies the logits number by number. `chunk` is how
    many tokens it reads at once. On a Zen 1 (AVX2 without VNNI), version 0.1.5 reads this model wrongly in chunks of 32
    and more: the loss of 256 tokens is 4.61 instead of 3.05. In chunks of 31 it is right.
    """

    packages = ("ik-llama-cpp-python",)

    def __init__(self, threads: int, chunk: int = 512):
        import numpy
        from ik_llama_cpp import _ctypes_api, _internals

        self.numpy, self.functions, self.internals = numpy, _ctypes_api, _internals
        self.threads, self.chunk = threads, chunk

    def open(self, file: str) -> None:
        model = self.internals.IkModel(file)
        room = self.longest + 256
        self.context = self.internals.IkContext(model, n_ctx=room, n_threads=self.threads, flash_attn=True)

    def prefill(self, ids: list[int]) -> None:
        self.context.kv_cache_clear()
        for start in range(0, len(ids), self.chunk):
            self._read(ids[start : start + self.chunk], start, logits_from=len(ids) - 1)
        self.position, self.token = len(ids), int(self._logits(-1).argmax())

    def decode(self, new: int) -> float:
        start = time.perf_counter()
        for _ in range(new):
            self._read([self.token], self.position, logits_from=0)
            self.position, self.token = self.position + 1, int(self._logits(-1).argmax())
        return time.perf_counter() - start

    def loss(self, ids: list[int]) -> float:
        self.context.kv_cache_clear()
        first, total = len(ids) - len(ids) // 2, 0.0  # the first token whose loss counts
        for start in range(0, len(ids), self.chunk):
            chunk = ids[start : start + self.chunk]
            self._read(chunk, start, logits_from=first - 1)
            for position in range(max(start, first - 1), min(start + len(chunk), len(ids) - 1)):
                logits = self._logits(position - start)
                highest = logits.max()
                log_sum = highest + self.numpy.log(self.numpy.exp(logits - highest).sum())
                total += float(log_sum - logits[ids[position + 1]])
        return total / (len(ids) // 2)

    def _read(self, ids: list[int], start: int, logits_from: int) -> None:
        """Reads tokens that stand at `start` and after it; those at `logits_from` and after it get logits."""
        batch = self.internals.make_batch_range(ids, pos_start=start, logits_last=False)
        for i in range(max(0, logits_from - start), len(ids)):
            batch.logits[i] = 1
        status = self.context.decode(batch)
        self.functions.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} for tokens {start} to {start + len(ids) - 1}")

    def _logits(self, i: int):
        return self.numpy.ctypeslib.as_array(self.context.get_logits(i), (self.context.model.n_vocab,))


class LlamaCpp(Engine):
    """llama.cpp, through the server of xllamacpp, called in this process. It gives no log-probabilities of a prompt."""

    packages = ("xllamacpp",)
    longest = 8128  # its server wants the tokens that it generates to fit into the model's 8,192 as well

    def __init__(self, threads: int):
        import xllamacpp

        self.xllamacpp, self.threads = xllamacpp, threads

    def open(self, file: str) -> None:
        params = self.xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = file, 8192, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        params.warmup, params.verbosity = False, -1
        self.server = self.xllamacpp.Server(params)

    def prefill(self, ids: list[int]) -> None:
        self.ids = ids
        self._complete(1, cache_prompt=False)

    def decode(self, new: int) -> float:
        """The server reads the last token of the prompt again; its own clock leaves that out."""
        return self._complete(new + 1, cache_prompt=True)["predicted_ms"] / 1e3

    def _complete(self, new: int, cache_prompt: bool) -> dict:
        """The times that the server took. `cache_prompt`: it may keep the tokens that it has read before."""
        request = {"prompt": self.ids, "n_predict": new, "temperature": 0, "ignore_eos": True}
        answers: list = []
        self.server.handle_completions(json.dumps(request | {"cache_prompt": cache_prompt}), answers.append)
        answer = answers[-1] if isinstance(answers[-1], dict) else json.loads(answers[-1])
        if "timings" not in answer:
            raise RuntimeError(str(answer.get("message") or answer.get("error") or answer))
        return answer["timings"]


TRANSFORMERS = "transformers"
ENGINES: dict[str, Callable[[int], Engine]] = {
    TRANSFORMERS: Transformers,
    "transformers-float32": functools.partial(Transformers, dtype="float32"),  # faster on many CPUs
    "headstart": Headstart,
    "headstart-int8": functools.partial(Headstart, int8_activations=True),
    "headstart-adaptive": functools.partial(Headstart, prefill="adaptive"),
    "headstart-plan": functools.partial(Headstart, prefill="plan"),
    "headstart-plan-int8": functools.partial(Headstart, prefill="plan", int8_activations=True),
    "openvino": OpenVino,
    "openvino-xattention": functools.partial(OpenVino, xattention=True),
    "ik_llama.cpp": IkLlama,
    "ik_llama.cpp-31": functools.partial(IkLlama, chunk=31),
    "llama.cpp": LlamaCpp,
}
TITLES = {
    TRANSFORMERS: "transformers + SDPA",
    "transformers-float32": "transformers + SDPA, float32",
    "headstart": "headstart, exact",
    "headstart-int8": "headstart, int8 activations",
    "headstart-adaptive": "headstart, adaptive",
    "headstart-plan": "headstart, searched plan",
    "headstart-plan-int8": "headstart, searched plan, int8 activations",
    "openvino": "OpenVINO GenAI",
    "openvino-xattention": "OpenVINO GenAI, XAttention",
    "ik_llama.cpp-31": "ik_llama.cpp, 31 tokens at once",
}


def of_this_tree(name: str) -> bool:
    """Whether an engine runs under the Python of `.venv`."""
    return name.startswith((TRANSFORMERS, "headstart"))


# --- the process that measures one of them ---------------------------------------------------------------------------


def measure(engine_name: str, request: dict, say: Callable[..., None]) -> None:
    """Measures every figure once. What fails is told, and ends the figures of this length or kind only.

    `request` has the model's `file`, the tokens `ids`, `threads`, the lengths to `prefill` and to `decode` after, the
    number of `new` tokens, and whether to measure the `loss`. The peak of the memory is told before the loss, which
    asks for logits that nobody else needs.
    """

    def attempt(what: str, call: Callable[[], object]) -> object:
        say(doing=what)
        try:
            return call()
        except Exception as error:
            first_line = (str(error).strip().splitlines() or ["no message"])[0]
            say(failure=f"{what}: {type(error).__name__}: {first_line[:200]}")
            return None

    engine = attempt("import", lambda: ENGINES[engine_name](request["threads"]))
    if engine is None:
        return
    say(versions={package: metadata.version(package) for package in engine.packages})
    if engine.note:
        say(note=engine.note)
    Path(request["file"]).read_bytes()  # now it is in memory, for whichever engine comes first
    ids, new = request["ids"], request["new"]
    opened = attempt("open", lambda: seconds(lambda: engine.open(request["file"])))
    if opened is None:
        return
    say(figure="open", value=opened)
    first = attempt("first token", lambda: seconds(lambda: engine.prefill(ids[:FIRST_PROMPT])))
    if first is None:
        return
    say(figure="first token", value=opened + first)
    attempt("warm-up", lambda: (engine.prefill(ids[: WARM_UP[0]]), engine.decode(WARM_UP[1])))
    for length in sorted({*request["prefill"], *request["decode"]}):
        tokens = min(length, engine.longest)
        if tokens < length:
            say(note=f"reads {tokens:,} of {length:,} tokens, as many as it takes")
        read = attempt(f"prefill {length}", lambda tokens=tokens: seconds(lambda: engine.prefill(ids[:tokens])))
        if read is None:
            continue
        if length in request["prefill"]:
            say(figure=f"prefill {length}", value=read)
        if length in request["decode"]:
            decoded = attempt(f"decode {length}", lambda: engine.decode(new))
            if decoded is not None:
                say(figure=f"decode {length}", value=new / decoded)
    say(figure="peak bytes", value=peak_bytes())
    if request["loss"]:
        loss = attempt("loss", lambda: engine.loss(ids))
        if loss is not None:
            say(figure="loss", value=loss)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes() -> int:
    """The most memory that this process has had (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    # Some engines write on standard output, which is kept for the lines of JSON.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**line) -> None:
        print(json.dumps(line), file=lines, flush=True)

    measure(sys.argv[1], json.load(sys.stdin), say)
    lines.flush()
    os._exit(0)  # an engine that fails at its own end has been measured all the same


if __name__ == "__main__":
    main()
