"""`headstart inspect`: what it collects from plans and from a tiny model, and the page and picture it leaves."""

import base64
import json
import struct
from html.parser import HTMLParser

import pytest
import torch

for package in ("transformers", "tokenizers", "matplotlib", "rich", "typer"):
    pytest.importorskip(package)

import tokenizers  # noqa: E402
import transformers  # noqa: E402

from headstart import BlockIndex, PrefillPlan, cli  # noqa: E402
from headstart.attention.patterns import HeadPattern  # noqa: E402
from headstart.attention.recording import visible_blocks  # noqa: E402
from headstart.commands import inspect  # noqa: E402
from headstart.commands.console import spread  # noqa: E402
from headstart.commands.inspect import data, report  # noqa: E402

LAYERS, HEADS, TOKENS = 2, 4, 300
SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
FINGERPRINT = {"model_type": "llama", "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
MIXED = PrefillPlan(
    HeadPattern.of("adaptive", threshold=0.6),
    (
        {
            0: HeadPattern.of("a_shape", sink=64, local=64, error=0.03, density=0.5, score=0.9),
            1: HeadPattern.of("vertical_slash", vertical_size=20, slash_size=64, local=8, error=0.01, density=0.25),
        },
        {2: HeadPattern.of("block_topk", top_k=1), 3: HeadPattern.of("dense")},
    ),
    FINGERPRINT,
    {"machine": {"cpu": "a <b>CPU</b>", "threads": 2}, "texts": ["a.txt", "b.txt"], "budget": 0.25, "none": None},
)


def make():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, attn_implementation="sdpa")).eval()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model that load_model opens, whose words are w0, w1, ..."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    make().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i * i % 61}" for i in range(600)))
    return path


@pytest.fixture
def plan(tmp_path):
    MIXED.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def collected(plan=MIXED, **options):
    """What `collect` gives after the tiny model has read, and what it recorded."""
    ids = torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        recorded = inspect.read(make(), plan, ids)
    reading = {"model": "tiny", "text": "random", "tokens": TOKENS, "environment": [["cpu", "one"]]}
    content = data.collect(plan, "plan.json", LAYERS, HEADS, recorded=recorded, reading=reading, **options)
    return content, recorded


def one_head(index: BlockIndex, head: int) -> BlockIndex:
    columns = [None if t is None else t[:, head : head + 1] for t in (index.column_count, index.column_index)]
    return BlockIndex(index.block_count[:, head : head + 1], index.block_index[:, head : head + 1], *columns)


# --- the data ------------------------------------------------------------------------------------------------------


def test_densities_are_those_of_the_recorded_indices():
    content, recorded = collected()
    total = 0.0
    for layer, row in enumerate(content["cells"]):
        index = recorded[layer].index
        for head, cell in enumerate(row):
            assert cell["density"] == pytest.approx(one_head(index, head).density(TOKENS, TOKENS), abs=1e-12)
            total += cell["density"]
    assert content["density"] == pytest.approx(total / (LAYERS * HEADS))
    assert content["cells"][1][3]["density"] == 1  # a dense head
    assert content["title"] == f"tiny reads 300 tokens at density {content['density']:.3f}"
    assert {row["pattern"]: row["heads"] for row in content["summary"]} == {
        "adaptive": 4,
        "a_shape": 1,
        "vertical_slash": 1,
        "block_topk": 1,
        "dense": 1,
    }


def test_blocks_unpack_to_the_recorded_blocks():
    content, recorded = collected()
    visible = content["reading"]["visible"]
    assert visible == [1, 2, 3, 4, 5]  # 300 tokens in blocks of 64
    for layer, entry in recorded.items():
        for head, cell in enumerate(content["cells"][layer]):
            blocks, share = data.unpack(content["blocks"][cell["blocks"]], visible)
            listed = torch.zeros(5, 5, dtype=torch.bool)
            for row in range(5):
                count = entry.index.block_count[0, head, row]
                listed[row, entry.index.block_index[0, head, row, :count].long()] = True
            assert torch.equal(torch.from_numpy(blocks), listed & torch.ones(5, 5).tril().bool())
            # The share counts single keys; without them it is the blocks.
            mask = one_head(entry.index, head).to_mask(TOKENS, TOKENS, causal=False)[0, 0]
            for row in range(5):
                for key in range(row + 1):
                    keys = mask[row * 64, key * 64 : key * 64 + 64].float().mean().item()
                    assert share[row, key] == pytest.approx(keys, abs=1 / 255)
    columns = [packed for packed in content["blocks"] if "columns" in packed]
    assert len(base64.b64decode(columns[0]["columns"])) == 5  # one row for all query blocks


def test_what_the_plan_measured_goes_with_every_head():
    alone = data.collect(MIXED, "plan.json", LAYERS, HEADS)
    read, _ = collected()
    for content in (alone, read):
        first, second, third = content["cells"][0][:3]
        assert (first["error"], first["score"]) == (0.03, 0.9)
        assert content["patterns"][first["pattern"]] == {"name": "a_shape", "params": {"sink": 64, "local": 64}}
        assert "error" not in third and "score" not in second
        assert {"pattern": "a_shape", "heads": 1, "error": 0.03}.items() <= next(
            row for row in content["summary"] if row["pattern"] == "a_shape"
        ).items()
    assert alone["cells"][0][0]["density"] == 0.5 and read["cells"][0][0]["plan_density"] == 0.5
    assert "density" not in alone["cells"][0][2] and alone["cells"][1][3]["density"] == 1
    assert alone["density"] is None and alone["title"] == "plan.json" and alone["blocks"] == []
    assert alone["provenance"] == [
        ("machine.cpu", "a <b>CPU</b>"),
        ("machine.threads", "2"),
        ("texts", "a.txt, b.txt"),
        ("budget", "0.25"),
    ]


def test_heads_that_share_an_index_share_their_blocks():
    content, recorded = collected(PrefillPlan.uniform("a_shape", sink=64, local=64))
    assert recorded[0].index.block_count.shape[1] == 1
    assert [[cell["blocks"] for cell in row] for row in content["cells"]] == [[0] * HEADS, [1] * HEADS]
    expected = recorded[0].index.density(TOKENS, TOKENS)
    assert [cell["density"] for cell in content["cells"][0]] == [pytest.approx(expected)] * HEADS
    assert content["chosen"] == [[0, 0]]  # all heads look alike


def test_a_layer_that_ran_the_models_own_attention_is_said_to():
    plan = PrefillPlan.uniform("adaptive", threshold=0.6)
    _, recorded = collected(plan)
    reading = {"model": "tiny", "text": "random", "tokens": TOKENS, "environment": []}
    content = data.collect(plan, None, LAYERS, HEADS, recorded={1: recorded[1]}, reading=reading)
    assert {content["patterns"][cell["pattern"]]["name"] for cell in content["cells"][0]} == {"own"}
    assert all(cell["density"] == 1 and "blocks" not in cell for cell in content["cells"][0])
    assert len(content["blocks"]) == HEADS and all(layer == 1 for layer, _ in content["chosen"])
    nothing = data.collect(plan, None, LAYERS, HEADS, recorded={}, reading=reading)
    assert nothing["density"] == 1 and nothing["blocks"] == [] and nothing["chosen"] == []
    for shown in (content, nothing):
        assert report.draw(shown) and embedded(report.page(shown))["cells"] == shown["cells"]


def test_chosen_heads_run_from_the_sparsest_to_the_densest():
    content, _ = collected(PrefillPlan.uniform("adaptive", threshold=0.6))
    densities = [content["cells"][layer][head]["density"] for layer, head in content["chosen"]]
    everyone = sorted({cell["density"] for row in content["cells"] for cell in row})
    assert densities == sorted(densities) and len(densities) == min(5, len(everyone))
    assert (densities[0], densities[-1]) == (everyone[0], everyone[-1])
    assert spread("abcdefg", 3) == ["a", "d", "g"] and spread("ab", 3) == ["a", "b"] and spread("", 3) == []


def test_a_page_too_large_keeps_the_chosen_heads(monkeypatch):
    monkeypatch.setattr(data, "BLOCKS_LIMIT", 1)
    content, _ = collected(chosen=[(1, 2), (0, 1)])
    kept = [(i, h) for i, row in enumerate(content["cells"]) for h, cell in enumerate(row) if "blocks" in cell]
    assert kept == [(0, 1), (1, 2)] and len(content["blocks"]) == 2


@pytest.mark.parametrize(
    ("nq", "nk", "block_q", "block_k"), [(300, 300, 64, 64), (100, 300, 64, 128), (64, 65, 128, 64)]
)
def test_visible_blocks_are_those_with_a_visible_key(nq, nk, block_q, block_k):
    keys = torch.arange(nk) <= torch.arange(nq)[:, None] + nk - nq
    want = [
        [bool(keys[r : r + block_q, k : k + block_k].any()) for k in range(0, nk, block_k)]
        for r in range(0, nq, block_q)
    ]
    assert visible_blocks(nq, nk, block_q, block_k).tolist() == want


# --- what is written -----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of a page, and the text of its scripts; every element must be closed by its own end tag."""

    VOID = {"meta", "link", "img", "br", "hr", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.found, self.scripts = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[self.open[-1][1].get("id")] = data


def embedded(text: str) -> dict:
    return json.loads(Page(text).scripts["data"])


def as_json(content: dict) -> dict:
    return json.loads(json.dumps(content))


def test_the_page_is_self_contained_and_holds_the_data():
    content, _ = collected()
    text = report.page(content)
    held = embedded(text)
    assert {name: held[name] for name in content} == as_json(content)
    assert set(report.PALETTE) == set(held["palette"]) and held["subtitle"].startswith("2 layers × 4 heads")
    template = text.replace(json.dumps(content["title"])[1:-1], "")
    assert "http:" not in template and "https:" not in template and "@import" not in template and "url(" not in template
    for tag, attributes in Page(text).found:
        assert tag not in ("link", "img", "iframe") and not {"src", "href"} & set(attributes)
    assert "prefers-color-scheme: dark" in text


def test_text_cannot_end_the_script(plan):
    content = data.collect(MIXED, "</script><b>.json", LAYERS, HEADS)
    assert embedded(report.page(content))["title"] == "</script><b>.json"


def png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def test_cli_draws_a_plan(plan, tmp_path, capsys):
    output = tmp_path / "new" / "report"
    assert cli.main(["inspect", str(plan), "-o", str(output)]) == 0
    assert sorted(file.name for file in output.iterdir()) == ["inspect.html", "inspect.png"]
    held = embedded((output / "inspect.html").read_text(encoding="utf-8"))
    assert held["title"] == held["plan"] == "plan.json" and held["reading"] is None
    assert [len(row) for row in held["cells"]] == [HEADS] * LAYERS
    width, height = png_size((output / "inspect.png").read_bytes())
    assert width == report.WIDTH * 120 and 300 < height < 1500
    printed = capsys.readouterr().out
    assert "vertical_slash" in printed and str(output / "inspect.html") in printed.replace("\n", "")


def test_cli_reads_a_text_with_a_plan(plan, text, model_folder, tmp_path, capsys):
    arguments = ["inspect", str(plan), "--model", str(model_folder), "--text", str(text), "--tokens", "200"]
    assert cli.main([*arguments, "--head", "1.2", "--head", "0.1", "-o", str(tmp_path)]) == 0
    held = embedded((tmp_path / "inspect.html").read_text(encoding="utf-8"))
    assert held["chosen"] == [[1, 2], [0, 1]]
    assert held["title"] == f"tiny reads 200 tokens at density {held['density']:.3f}"
    reading = held["reading"]
    assert (reading["text"], reading["tokens"], reading["visible"]) == ("text.txt", 200, [1, 2, 3, 4])
    assert dict(reading["environment"])["torch"] == torch.__version__
    assert all("blocks" in cell and 0 < cell["density"] <= 1 for row in held["cells"] for cell in row)
    assert png_size((tmp_path / "inspect.png").read_bytes())[0] == report.WIDTH * 120
    assert f"{held['density']:.3f}" in capsys.readouterr().out


def test_without_a_plan_every_head_has_the_named_pattern(text, model_folder, tmp_path):
    content = inspect.run(model=model_folder, text=text, prefill="block_topk", output=tmp_path)
    assert content["reading"]["tokens"] == 512 and content["plan"] is None  # all that the model reads
    assert [row["pattern"] for row in content["summary"]] == ["block_topk"]


def test_a_plan_for_any_model_is_one_cell(tmp_path):
    PrefillPlan.uniform("a_shape").save(tmp_path / "plan.json")
    content = inspect.run(tmp_path / "plan.json", output=tmp_path)
    assert (content["layers"], content["heads"], len(content["cells"])) == (1, 1, 1)


def test_a_picture_of_many_heads_stays_a_picture():
    plan = PrefillPlan.uniform("adaptive")
    figure = report.draw(data.collect(plan, "plan.json", 126, 128))
    assert figure.get_size_inches()[0] == report.WIDTH and figure.get_size_inches()[1] < 12


# --- errors --------------------------------------------------------------------------------------------------------


def edited(plan, *keys, value):
    content = json.loads(plan.read_text())
    *path, last = keys
    inner = content
    for key in path:
        inner = inner[key]
    inner[last] = value
    plan.write_text(json.dumps(content))


def fails(arguments, capsys) -> str:
    """The one line that a failing command prints."""
    assert cli.main(["inspect", *map(str, arguments)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("headstart: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["layers", 0, "1", "pattern"], "zigzag", "layers[0][1].pattern: expected one of dense, a_shape,"),
        (["layers", 0, "1", "vertical_size"], -3, "layers[0][1].vertical_size: expected an integer, at least 1"),
        (["layers", 0, "0", "density"], float("nan"), "layers[0][0].density: expected a number from 0 to 1, got nan"),
        (["layers", 0, "0", "density"], 1.5, "layers[0][0].density: expected a number from 0 to 1, got 1.5"),
        (["layers", 0, "0", "error"], "low", "layers[0][0].error: expected a finite number, at least 0, got 'low'"),
        (["layers", 1, "9"], {"pattern": "dense"}, "heads: expected 10 (those that the plan lists) to 4096, got 4"),
        (["model", "num_hidden_layers"], 1, "layers: expected 2 (those that the plan lists) to 4096, got 1"),
        (["model", "num_attention_heads"], 10**9, "heads: expected 4 (those that the plan lists) to 4096"),
        (["format"], "other", "format: expected 'headstart.prefill_plan', got 'other'"),
    ],
)
def test_an_edited_plan_names_the_file_and_the_field(plan, keys, value, message, tmp_path, capsys):
    edited(plan, *keys, value=value)
    line = fails([plan, "-o", tmp_path / "out"], capsys)
    assert f"{plan}: {message}" in line
    assert not (tmp_path / "out").exists()


def test_a_missing_or_truncated_plan_is_named(plan, tmp_path, capsys):
    assert "nowhere.json" in fails([tmp_path / "nowhere.json", "-o", tmp_path / "out"], capsys)
    plan.write_bytes(plan.read_bytes()[:100])
    assert f"{plan}: not a JSON file" in fails([plan, "-o", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "inspect: plan: expected a plan's file, a model, or both, got neither"),
        (["PLAN", "--prefill", "dense"], "inspect: prefill: expected none beside a plan, got 'dense'"),
        (["PLAN", "--tokens", "100"], "inspect: tokens: expected a model to read with, got 100 and no model"),
        (["PLAN", "--head", "0.0"], "inspect: head: expected a model to read with, got ['0.0'] and no model"),
        (["--model", "MODEL", "--prefill", "zigzag"], "pattern: expected one of dense, a_shape,"),
        (["--model", "nowhere"], "load_model: model: expected a directory with a config.json"),
        (["--model", "MODEL", "--text", "TEXT", "--tokens", "63"], "inspect: tokens: expected 64 to 512, "),
        (["--model", "MODEL", "--text", "TEXT", "--tokens", "513"], "got 513"),
        (
            ["--model", "MODEL", "--text", "TEXT", "--head", "2.0"],
            "head: expected LAYER.HEAD from 0.0 to 1.3, got '2.0'",
        ),
        (
            ["--model", "MODEL", "--text", "TEXT", "--head", "0.4"],
            "head: expected LAYER.HEAD from 0.0 to 1.3, got '0.4'",
        ),
        (["--model", "MODEL", "--text", "TEXT", "--head", "-1"], "head: expected LAYER.HEAD from 0.0 to 1.3, got '-1'"),
        (["--model", "MODEL", "--text", "EMPTY"], "empty.txt: expected a text, got an empty file"),
        (["--model", "MODEL", "--text", "BINARY"], "binary.txt: expected UTF-8 text, got"),
        (["--model", "MODEL", "--text", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_arguments_are_named(arguments, message, plan, text, model_folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00w1")
    names = {"PLAN": plan, "MODEL": model_folder, "TEXT": text}
    names |= {"EMPTY": tmp_path / "empty.txt", "BINARY": tmp_path / "binary.txt"}
    line = fails([*(names.get(a, a) for a in arguments), "-o", tmp_path / "out"], capsys)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_model_is_named(plan, text, model_folder, tmp_path, capsys):
    edited(plan, "model", "model_type", value="qwen2")
    line = fails([plan, "--model", model_folder, "--text", text, "-o", tmp_path / "out"], capsys)
    assert f"{plan}: PrefillPlan: the plan is for another model: model_type: expected 'qwen2', got 'llama'" in line
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_no_part_of_a_file(plan, tmp_path, monkeypatch, capsys):
    def fail(self, path, **_):
        path.write_bytes(b"\x89PNG")
        raise OSError("No space left on device")

    monkeypatch.setattr(report.Figure, "savefig", fail)
    assert "No space left" in fails([plan, "-o", tmp_path / "out"], capsys)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["inspect.html"]
    assert "File exists" in fails([plan, "-o", plan], capsys)
