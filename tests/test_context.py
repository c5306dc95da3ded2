"""A fixed context: what attends all of it is the model on the whole text, whatever serves it; its file; relocation."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import headstart  # noqa: E402
from headstart import Context, cli  # noqa: E402
from headstart.attention.recording import record  # noqa: E402
from headstart.context import context as contexts  # noqa: E402
from headstart.context import file as context_file  # noqa: E402
from headstart.context import layer as layers  # noqa: E402
from headstart.context.layer import Rope  # noqa: E402
from headstart.ops.centroid_lookup import centroid_top_p  # noqa: E402

TOKENS, QUESTION = 700, 9
SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)


@pytest.fixture(autouse=True)
def every_length_is_looked_up(monkeypatch):
    monkeypatch.setattr(contexts, "BREAK_EVEN", 0)
    with torch.inference_mode():
        yield


def make(kind="Llama", **changes):
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes, attn_implementation="sdpa")
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def tokens(n, rows=1, seed=0):
    return torch.randint(2, 64, (rows, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def context(model):
    return Context.build(model, tokens(TOKENS), parents=0.01, prefill="dense")


@pytest.fixture
def patched(model):
    yield headstart.patch(model, "dense")
    headstart.unpatch(model)


# --- what is attended ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3"])
def test_attending_everything_is_the_model_on_the_whole_text(kind):
    changes = {"Mistral": {"sliding_window": None}, "Phi3": {"sliding_window": None}}.get(kind, {})
    model, question = make(kind, **changes), tokens(QUESTION, seed=1)
    want = model(torch.cat([tokens(TOKENS), question], 1)).logits[:, -QUESTION:]
    context = Context.build(model, tokens(TOKENS), prefill="dense")
    assert model.config._attn_implementation == "sdpa"  # the model is left as it was
    headstart.patch(model, "dense")
    got = model(question, past_key_values=context.cache(density=1)).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"selection": "top_k"}, {"budget": "equal"}, {"budget": "global"}, {"hierarchical": True}], ids=str
)
def test_high_density_changes_little_and_low_density_more(model, context, patched, options):
    question = tokens(QUESTION, seed=1)
    exact = model(question, past_key_values=context.cache(density=1)).logits
    errors, shares = [], []
    for density in (0.999, 0.5, 0.05):
        cache = context.cache(density=density, **{"hierarchical": False} | options)
        with record() as entries:
            logits = model(question, past_key_values=cache).logits
        errors.append((logits - exact).abs().max().item())
        shares.append(sum(e.index.column_count.float().mean().item() for e in entries))
    assert errors[0] < 0.02 and errors[0] < errors[2] < 3
    assert shares[0] >= shares[1] > shares[2]


def test_top_k_takes_as_many_keys_as_the_density_says(model, context, patched):
    with record() as entries:
        model(tokens(1, seed=1), past_key_values=context.cache(density=0.25, selection="top_k"))
    m = context.layers[0].clustered
    assert [e.path for e in entries] == ["context"] * 2
    assert all((e.index.column_count == round(0.25 * m)).all() for e in entries)


def test_top_p_takes_the_fewest_clusters_that_hold_the_mass(model, context, patched):
    question = tokens(1, seed=1)
    exact = model(question, past_key_values=context.cache(density=1)).logits
    counts = []
    for mass in (0.3, 0.9, 1.0):
        with record() as entries:
            logits = model(question, past_key_values=context.cache(selection="top_p", mass=mass)).logits
        counts.append(sum(e.index.column_count.sum().item() for e in entries))
    torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)
    assert 0 < counts[0] < counts[1] < counts[2] == 4 * context.layers[0].clustered

    clusters = context.layers[0].flat_clusters
    q = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    count, index = centroid_top_p(q, clusters, 0.5, scale=1.0)
    for head in range(2):
        sizes = clusters.cluster_offsets[head].diff()
        weight = ((clusters.centroids[head].double() @ q[0, head, 0].double()) + sizes.log()).softmax(0)
        order = weight.div(sizes.clamp(min=1)).argsort(descending=True)
        needed = order[: int((weight[order].cumsum(0) < 0.5).sum()) + 1]
        keys = torch.cat([torch.arange(*clusters.cluster_offsets[head, j : j + 2].tolist()) for j in needed])
        assert index[0, head, 0, : count[0, head, 0]].tolist() == keys.sort().values.tolist()
    with pytest.raises(ValueError, match="centroid_top_p: max_columns: expected .*, got -3"):
        centroid_top_p(q, clusters, 0.5, max_columns=-3)


def test_generate_answers_like_the_model_on_the_whole_text(model, context):
    questions = [tokens(QUESTION, seed=s) for s in (1, 2)]
    options = dict(max_new_tokens=6, do_sample=False)
    want = [model.generate(torch.cat([tokens(TOKENS), q], 1), **options)[:, -6:] for q in questions]
    headstart.patch(model, "dense")
    try:
        cache = context.cache(density=1)
        for question, answer in zip(questions, want):
            got = model.generate(question, past_key_values=cache, **options)
            assert torch.equal(got[:, :QUESTION], question) and torch.equal(got[:, -6:], answer)
            cache.reset()
        # Both at once, and one of them shorter, with padding on its left.
        batch = torch.cat(questions)
        got = model.generate(batch, past_key_values=context.cache(batch_size=2, density=1), **options)
        assert torch.equal(got[:, -6:], torch.cat(want))
        padded = torch.cat([torch.cat([tokens(3, seed=9), questions[0]], 1), torch.cat([tokens(3), questions[1]], 1)])
        mask = torch.ones_like(padded)
        mask[:, :3] = 0
        got = model.generate(padded, attention_mask=mask, past_key_values=context.cache(2, density=1), **options)
        assert torch.equal(got[:, -6:], torch.cat(want))
        beams = model.generate(questions[0], past_key_values=context.cache(density=1), num_beams=3, max_new_tokens=4)
    finally:
        headstart.unpatch(model)
    whole = torch.cat([tokens(TOKENS), questions[0]], 1)
    assert torch.equal(beams[:, -4:], model.generate(whole, num_beams=3, max_new_tokens=4)[:, -4:])


def test_a_batch_shares_the_context(model, context, patched):
    cache = context.cache(batch_size=8, density=0.5)
    before = [layer.keys.data_ptr() for layer in context.layers]
    one = model(tokens(QUESTION, seed=1), past_key_values=context.cache(density=0.5)).logits
    eight = model(tokens(QUESTION, seed=1).expand(8, -1), past_key_values=cache).logits
    torch.testing.assert_close(eight, one.expand_as(eight), rtol=1e-5, atol=1e-5)
    assert [layer.context.keys.data_ptr() for layer in cache.layers] == before
    assert cache.get_seq_length() == QUESTION
    cache.reset()
    assert cache.get_seq_length() == 0


def test_short_contexts_are_attended_whole(model, monkeypatch):
    monkeypatch.setattr(contexts, "BREAK_EVEN", 2**20)
    context = Context.build(model, tokens(64), prefill="dense")
    assert context.layers[0].clustered == 64
    question = tokens(QUESTION, seed=1)
    want = model(torch.cat([tokens(64), question], 1)).logits[:, -QUESTION:]
    headstart.patch(model, "dense")
    try:
        got = model(question, past_key_values=context.cache(density=0.1)).logits
    finally:
        headstart.unpatch(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# --- what is computed ahead of time ----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_context_and_keys_lie_in_cluster_order(model, context):
    again = Context.build(model, tokens(TOKENS), parents=0.01, prefill="dense")
    for a, b in zip(context.layers, again.layers, strict=True):
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(context_file._fields(a), context_file._fields(b)))
    layer = context.layers[0]
    first, last = layers.clustered_range(TOKENS)
    assert (first, (last - first) % 64, layer.clustered) == (4, 0, last - first)
    assert TOKENS - last >= layers.WINDOW
    offsets, keys = layer.clusters.cluster_offsets, layer.keys[:, : layer.clustered]
    sizes = offsets.diff(dim=-1)
    assert sizes.max() <= layers.LARGEST_CLUSTER * math.ceil(layer.clustered / round(0.05 * layer.clustered))
    for head in range(len(keys)):
        for j in range(sizes.shape[1]):
            run = keys[head, offsets[head, j] : offsets[head, j + 1]]
            mean = run.mean(0) if len(run) else torch.zeros(keys.shape[-1])
            torch.testing.assert_close(layer.clusters.centroids[head, j], mean, rtol=1e-4, atol=1e-5)


def test_quantiles_are_those_of_the_keys():
    scores = torch.tensor([[[-1.0, -5.0, -2.0, -math.inf]]])
    table = layers.quantiles(scores, torch.tensor([[10, 70, 20, 0]]))[0]

    def at(share):
        return layers.interpolate(table[None], share).item()

    assert [at(0.2), at(0.5), at(0.69), at(0.75), at(0.89), at(0.95), at(1.0)] == [-5, -5, -5, -2, -2, -1, -1]
    assert at(0.0) == -math.inf  # nothing is left out


@pytest.mark.parametrize("budget", layers.BUDGETS)
def test_thresholds_leave_out_the_share_that_was_asked_for(context, budget):
    tables = [layer.scores for layer in context.layers]
    for density in (0.7, 0.2):
        limits = layers.thresholds(context.layers, density, budget, hierarchical=False)
        shares = torch.stack([(t <= limit[:, None]).double().mean(1) for t, (limit, _) in zip(tables, limits)])
        assert shares.mean().item() == pytest.approx(1 - density, abs=0.01)
        assert budget != "equal" or (shares - (1 - density)).abs().max() < 0.01


@given(
    errors=st.lists(
        st.lists(st.floats(0, 1), min_size=len(layers.SHARES) - 1, max_size=len(layers.SHARES) - 1),
        min_size=1,
        max_size=6,
    ),
    left_out=st.floats(0.01, 0.99),
)
def test_shares_of_heads_are_no_worse_than_equal_ones(errors, left_out):
    table = torch.tensor([[0.0, *sorted(row)] for row in errors])
    (shares,) = layers.head_shares([table], left_out)
    assert shares.mean().item() == pytest.approx(left_out, abs=1e-3)
    assert ((0 <= shares) & (shares <= 1)).all()

    # Between the shares of the table, a head can take turns: its cost is the lower hull.
    def cost(rows, at):
        total = 0.0
        for row, share in zip(rows.tolist(), at.tolist()):
            points = list(zip(layers.SHARES, row))
            lines = [
                y + (v - y) * (share - x) / (u - x) for x, y in points for u, v in points if x <= share <= u and x < u
            ]
            total += min(lines)
        return total

    assert cost(table, shares) <= cost(table, torch.full_like(shares, left_out)) + 1e-3


def test_a_head_that_looks_for_one_key_keeps_more_of_them():
    """One head attends evenly, the other a key unlike its neighbours, which clusters hide: it leaves out fewer."""
    torch.manual_seed(0)
    n, d, w = 2048, 32, layers.WINDOW
    k = torch.randn(2, n, d)
    q = 0.1 * torch.randn(2, w, d)
    q[1] = 2 * k[1, torch.randint(0, n - 200, (w,))]
    layer = layers.arrange(k, 2 + torch.randn(2, n, d), q, 0.05, None, seed=0)
    (shares,) = layers.head_shares([layer.errors], 0.8)
    assert shares[0] > 0.85 > 0.75 > shares[1] and shares.mean().item() == pytest.approx(0.8, abs=1e-3)


def test_errors_by_definition():
    torch.manual_seed(0)
    n, d, w, group = 700, 16, 40, 2
    k, v, q = torch.randn(2, n, d), torch.randn(2, n, d), 2 * torch.randn(2 * group, w, d)
    layer = layers.arrange(k, v, q, 0.1, None, seed=0)
    m, clusters = layer.clustered, layer.clusters
    want = torch.zeros(2, len(layers.SHARES), dtype=torch.float64)
    for h in range(2):
        one = headstart.KeyClusters(
            *(x[h : h + 1] for x in (clusters.centroids, clusters.cluster_offsets, clusters.order))
        )
        mine, keys, values = q[h * group : (h + 1) * group], layer.keys[h].double(), layer.values[h].double()
        for j in range(w):
            seen = n - w + j + 1
            p = (mine[:, j].double() @ keys[:seen].T / 4).softmax(-1)
            out = p @ values[:seen]
            for i, share in enumerate(layers.SHARES):
                limit = layers.interpolate(layer.scores, share)[h].exp()
                count, columns = headstart.centroid_lookup(mine[None, :, j : j + 1], one, limit)
                taken = torch.cat([columns[0, 0, 0, : int(count)].long(), torch.arange(m, seen)])
                some = p[:, taken] @ values[taken] / p[:, taken].sum(-1, keepdim=True)
                want[h, i] += ((some - out).square().sum(-1) / out.square().sum(-1)).mean() / w
    torch.testing.assert_close(layer.errors.double(), want.cummax(1).values, rtol=0.02, atol=1e-4)
    assert (layer.errors[:, 0] < 1e-9).all() and (layer.errors[:, -1] > 0.1).all()


# --- relocation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_shifting_keys_is_turning_them_at_another_position(interleaved):
    rope = Rope(tuple(10000 ** (-i / 8) for i in range(8)), interleaved)
    q, k = torch.randn(2, 20, dtype=torch.float64)
    want = rope.shift(q, 40) @ rope.shift(k, 10)
    torch.testing.assert_close(rope.shift(q, 10) @ rope.shift(k, -20), want)
    assert torch.equal(rope.shift(k, 5)[16:], k[16:])
    torch.testing.assert_close(rope.shift(rope.shift(k, 7), -7), k)


def test_chunks_one_after_another_are_what_reading_them_at_their_places_gives(model, patched):
    parts = [tokens(300, seed=5), tokens(200, seed=6)]
    a, b = (Context.build(model, part, parents=0.02) for part in parts)
    joined = Context.concat([a, b])
    assert (joined.tokens, joined.layers[0].keys.shape[1], joined.layers[0].clustered) == (500, 500, 192 + 64)
    # The same keys and values as ordinary caches: each chunk read by itself, at its place.
    keys, values = [], []
    for part, first in zip(parts, (-500, -200)):
        cache = transformers.DynamicCache()
        positions = torch.arange(first, first + part.shape[1])[None]
        headstart.unpatch(model)(part, position_ids=positions, past_key_values=cache)
        keys.append([layer.keys for layer in cache.layers])
        values.append([layer.values for layer in cache.layers])
    own = transformers.DynamicCache()
    for i in range(2):
        own.update(*(torch.cat([part[i] for part in parts_], 2) for parts_ in (keys, values)), i)
    question = tokens(QUESTION, seed=1)
    # The mask is that of 500 keys before; the positions are the question's own.
    want = model(question, position_ids=torch.arange(QUESTION)[None], past_key_values=own).logits
    headstart.patch(model, "dense")
    for options in ({"density": 1}, {"density": 0.999}, {"density": 0.999, "hierarchical": False}):
        got = model(question, past_key_values=joined.cache(**options)).logits
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert Context.concat([a]) is a


# --- the artifact ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(context, tmp_path):
    context.save(tmp_path / "context")
    return tmp_path / "context"


def test_a_saved_context_is_the_same(model, context, saved, patched):
    loaded = Context.load(saved)
    for a, b in zip(context.layers, loaded.layers, strict=True):
        names = [name for name, _ in context_file._fields(a)]
        assert names == [name for name, _ in context_file._fields(b)] and "child_scores" in names
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(context_file._fields(a), context_file._fields(b)))
    assert (loaded.model, loaded.tokens, loaded.token_hash) == (context.model, context.tokens, context.token_hash)
    assert (loaded.rope, loaded.settings) == (context.rope, context.settings)
    question = tokens(QUESTION, seed=1)
    want = model(question, past_key_values=context.cache()).logits
    assert torch.equal(model(question, past_key_values=loaded.cache()).logits, want)
    loaded.save(saved)  # in the place of what it was loaded from
    assert Context.load(saved).tokens == TOKENS


def test_damage_names_the_file_and_the_field(saved):
    tensors, description = saved / "context.safetensors", saved / "context.json"
    whole, words = tensors.read_bytes(), description.read_text()

    def expect(message, error=ValueError):
        with pytest.raises(error, match=message):
            Context.load(saved)

    tensors.write_bytes(whole[:-100])
    expect("context.safetensors: not a whole safetensors file")
    middle = len(whole) // 2  # of a layer's keys or values
    tensors.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    expect(r"context.safetensors: layers\.\d\.\w+: expected the checksum")
    assert Context.load(saved, verify=False).tokens == TOKENS
    tensors.write_bytes(whole)
    for change, message in (
        ({"version": 1}, "context.json: version: expected 2, got 1"),
        ({"format": "other"}, "context.json: format"),
        ({"tokens": TOKENS + 1}, r"layers.0: keys: expected \[2, 701, 16\], got \[2, 700, 16\]"),
        ({"tokens": "many"}, "context.json: tokens: expected an integer, got 'many'"),
        ({"layers": 3}, "layers.2: centroids: expected a tensor"),
        ({"rope": {"inv_freq": "x"}}, "context.json: rope"),
        ({"checksums": {}}, "expected the tensors that context.json lists"),
    ):
        description.write_text(json.dumps(json.loads(words) | change))
        expect(message)
    description.write_text(words[:50])
    expect("context.json: not a JSON file")
    description.unlink()
    expect("expected a folder with context.json", FileNotFoundError)


def test_a_folder_of_something_else_is_not_replaced(context, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"Context.save: folder: expected a new folder"):
        context.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density: expected a share above 0 and up to 1, got 0.0"),
        ({"density": "0.9"}, "density"),
        ({"batch_size": 0}, "batch_size: expected a positive integer, got 0"),
        ({"selection": "best"}, "selection: expected one of threshold, top_k, top_p, got best"),
        ({"selection": "top_p"}, "mass: expected a share above 0 and up to 1, got None"),
        ({"mass": 0.5}, 'mass: expected None, but for selection="top_p", got 0.5'),
    ],
)
def test_bad_options_are_named(context, options, message):
    with pytest.raises(ValueError, match=message):
        context.cache(**options)


def test_what_does_not_fit_is_an_error(model, context, patched):
    with pytest.raises(ValueError, match="expected a batch of 3, as Context.cache was told"):
        model(tokens(QUESTION, rows=2), past_key_values=context.cache(batch_size=3))
    other = headstart.patch(make(num_attention_heads=8, head_dim=16), "dense")
    with pytest.raises(ValueError, match="expected the model that the context was built with"):
        other(tokens(QUESTION), past_key_values=context.cache())
    for ids, message in (
        (tokens(63), "input_ids: expected at least 64 tokens, got 63"),
        (tokens(100, rows=2), r"input_ids: expected .*\[1, N\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Context.build(model, ids)
    with pytest.raises(ValueError, match="clusters: expected a share"):
        Context.build(model, tokens(100), clusters=0)
    with pytest.raises(ValueError, match="parents: expected no larger a share"):
        Context.build(model, tokens(100), clusters=0.05, parents=0.1)
    flat = Context.build(model, tokens(100))
    with pytest.raises(ValueError, match="hierarchical: expected False, since there are no parents"):
        flat.cache(hierarchical=True)
    with pytest.raises(ValueError, match="layers that attend everything before"):
        Context.build(make("Mistral", sliding_window=32), tokens(100))


def test_a_model_that_is_not_patched_does_not_answer_without_the_context(model, context):
    cache = context.cache()
    with pytest.raises(RuntimeError, match=r"would leave the fixed context out.*headstart\.patch"):
        model(tokens(QUESTION), past_key_values=cache)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_builds_what_load_reads(tmp_path, monkeypatch, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(64)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | {"[UNK]": 63}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    make().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 60}" for i in range(400)))
    folder = tmp_path / "context"
    arguments = ["context", "build", str(tmp_path / "model"), str(text), "-o", str(folder), "--prefill", "dense"]
    assert cli.main([*arguments, "--tokens", "300", "--parents", "0.02"]) == 0
    assert "300 tokens" in capsys.readouterr().out
    assert Context.load(folder).tokens == 300
    assert cli.main([*arguments, "--tokens", "401"]) == 1
    assert "tokens: expected 1 to 400" in capsys.readouterr().err
    text.write_text(" ")
    assert cli.main(arguments) == 1 and "got an empty file" in capsys.readouterr().err
