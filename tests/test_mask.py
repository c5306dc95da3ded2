"""What a mask of transformers is read as, and the sliding windows and packed sequences that models run with it."""

import itertools
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import masking_utils  # noqa: E402

from headstart.attention import forward  # noqa: E402
from headstart.attention.forward import force_path  # noqa: E402
from headstart.attention.mask import headstart_mask  # noqa: E402
from headstart.attention.plan import PrefillPlan  # noqa: E402
from headstart.attention.recording import record  # noqa: E402
from headstart.model.patch import patch  # noqa: E402
from models import EVERYTHING, left_padded, logits, make, tokens  # noqa: E402


@pytest.fixture(autouse=True)
def sparse_from_the_first_token():
    """Tiny prompts go the way of long ones, and no warning goes unnoticed."""
    with warnings.catch_warnings(), force_path("sparse"):
        warnings.filterwarnings("error", message="headstart: the model's own attention")
        yield


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# --- the mask --------------------------------------------------------------------------------------------------------


def told(mask) -> torch.Tensor:
    """The dense mask that a mask's attributes tell of."""
    assert mask.unknown is None
    batch, _, nq, nk = mask.shape
    q = torch.arange(nq)[:, None] + mask.num_keys - nq
    k = torch.arange(nk)
    seen = ((k <= q) & (k > q - (mask.window or nk + nq))).repeat(batch, 1, 1, 1)
    if mask.kv_start is not None:
        seen &= k >= mask.kv_start[:, None, None, None]
    if mask.sequences is not None:
        apart = torch.zeros_like(seen)
        for row, begin, end in mask.sequences:
            apart[row, :, begin:end, begin:end] = True
        seen &= apart
    return seen


def built(mask) -> torch.Tensor:
    return mask & True


CAUSAL = masking_utils.causal_mask_function
PADDINGS = {"none": None, "nothing": [0, 0], "some": [3, 0], "most": [15, 2], "all": [60, 1]}
REMAPS = hasattr(masking_utils, "remap_positions_for_packed_sequence")  # transformers 5.17 does not


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("window", [None, 1, 5, 20, 100])
def test_a_mask_is_what_it_says(window, padding):
    function = CAUSAL if window is None else masking_utils.sliding_window_causal_mask_function(window)
    for nq, past, offset, room in itertools.product((1, 7, 20), (0, 13), (0, 6), (0, 9)):
        if offset > past:
            continue
        hidden = PADDINGS[padding]
        real = None if hidden is None else torch.arange(past + nq) >= torch.tensor(hidden)[:, None]
        mask = headstart_mask(2, nq, past + nq - offset + room, past, offset, function, real)
        assert mask.num_keys == past + nq - offset and torch.equal(told(mask), built(mask))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("remapped", [True, False])
@pytest.mark.parametrize("lengths", [[[12]], [[5, 7]], [[1, 1, 10]], [[3, 4, 5], [12]], [[12], [11, 1]]], ids=str)
def test_a_packed_mask_is_what_it_says(lengths, remapped, window):
    function = CAUSAL if window is None else masking_utils.sliding_window_causal_mask_function(window)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    if remapped and not REMAPS:
        pytest.skip("this transformers does not remap positions")
    if remapped:
        function = masking_utils.packed_sequence_compatibility_function(function, positions, packed)
    else:
        function = masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(packed))
    mask = headstart_mask(len(lengths), 12, 12, mask_function=function)
    assert [[end - begin for row, begin, end in mask.sequences if row == r] for r in range(len(lengths))] == lengths
    assert torch.equal(told(mask), built(mask))
    limits = torch.tensor([0, *itertools.accumulate(itertools.chain(*lengths))])
    assert mask.splits_at(limits) and mask.splits_at(limits.repeat_interleave(2))
    assert not mask.splits_at(torch.tensor([0, 2, 12 * len(lengths)])) and not mask.splits_at(limits[:-1])


def overlays():
    of, positions = torch.tensor([[0, 0, 1, 1, 0, 0]]), torch.tensor([[0, 1, 0, 2, 3, 4]])
    packed = masking_utils.packed_sequence_mask_function
    of_positions = {
        "positions left out": lambda: masking_utils.packed_sequence_compatibility_function(
            CAUSAL, positions, of.sort()[0]
        ),
        "packed by position": lambda: masking_utils.and_masks(
            CAUSAL, masking_utils.remap_positions_for_packed_sequence(packed(of.sort()[0]), positions)
        ),
        "positions that are not packed": lambda: masking_utils.remap_positions_for_packed_sequence(CAUSAL, positions),
    }
    return {
        "or": masking_utils.or_masks(CAUSAL, lambda b, h, i, j: j < 2),
        "and": masking_utils.and_masks(CAUSAL, lambda b, h, i, j: j != 3),
        "not causal": masking_utils.sliding_window_overlay(3),
        "bidirectional": masking_utils.bidirectional_mask_function,
        "bidirectional window": masking_utils.sliding_window_bidirectional_mask_function(3),
        "chunks": masking_utils.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long)),
        "blocks": masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(of)),
        "another's": lambda b, h, i, j: j <= i,
        "packed in pieces": masking_utils.and_masks(CAUSAL, packed(of)),
        "packed twice": masking_utils.and_masks(CAUSAL, packed(of), packed(of)),
        "no window at all": masking_utils.sliding_window_causal_mask_function(0),
        **{name: make() for name, make in of_positions.items() if REMAPS},
    }


@pytest.mark.parametrize("name", overlays())
def test_any_other_mask_is_unknown(name):
    assert headstart_mask(1, 6, 6, mask_function=overlays()[name]).unknown is not None


def test_masks_of_other_keys_are_unknown():
    packed = masking_utils.and_masks(CAUSAL, masking_utils.packed_sequence_mask_function(torch.zeros(1, 6)))
    assert headstart_mask(1, 6, 6, mask_function=packed).unknown is None
    ones = torch.ones(1, 6, dtype=torch.bool)
    for arguments in (
        dict(q_length=6, kv_length=6, kv_offset=1),
        dict(q_length=6, kv_length=5),
        dict(q_length=2, kv_length=6, q_offset=5),
        dict(q_length=6, kv_length=8, mask_function=packed),
        dict(q_length=6, kv_length=6, mask_function=packed, attention_mask=ones),
        dict(q_length=1, kv_length=7, q_offset=6, attention_mask=ones),
        dict(q_length=6, kv_length=6, attention_mask=ones.index_fill(1, torch.tensor(5), False)),
        dict(q_length=6, kv_length=6, attention_mask=ones.index_fill(1, torch.tensor(2), False)),
    ):
        assert headstart_mask(1, **arguments).unknown is not None, arguments


def test_a_mask_is_built_only_when_it_is_used():
    mask = headstart_mask(2, 4, 6, q_offset=2)
    assert mask.shape == (2, 1, 4, 6) and mask.dtype == torch.bool and mask.unknown is None and not mask.built
    assert torch.equal(mask[:, :, :, :3] & True, torch.ones(4, 6, dtype=torch.bool).tril(2)[:, :3].expand(2, 1, 4, 3))
    assert mask.built.keys() == {"dense"}


def test_left_padding_gives_the_first_real_key():
    padding = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert headstart_mask(2, 4, 4, attention_mask=padding).kv_start.tolist() == [0, 2]
    assert headstart_mask(2, 1, 2, 3, 2, attention_mask=padding).kv_start is None
    assert headstart_mask(2, 4, 4, attention_mask=torch.ones_like(padding)).kv_start is None


# --- sliding windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [1, 2, 64, 100, 149])
def test_a_sliding_window_that_cuts(attn, window):
    model = make("Mistral", attn, sliding_window=window)
    want = logits(model, tokens())
    with record() as entries:
        close(logits(patch(model, PrefillPlan.uniform("a_shape", sink=1, local=1)), tokens()), want)
    assert [(e.path, e.window) for e in entries] == [("window", window)] * 2


@pytest.mark.parametrize("window", [150, 4096])
def test_a_sliding_window_that_does_not_cut_is_causal(window):
    model = make("Mistral", sliding_window=window)
    want = logits(model, tokens())
    with record() as entries:
        close(logits(patch(model, EVERYTHING["adaptive"]), tokens()), want)
    assert [(e.path, e.window) for e in entries] == [("sparse", None)] * 2


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("length", [97, 130])
def test_generate_across_a_sliding_window(options, length):
    """A window that fills while tokens are generated, or in the prompt; a row that is mostly padding."""
    model = make("Mistral", sliding_window=100)
    ids, mask = left_padded([length, 20], length)
    options |= dict(max_new_tokens=10, do_sample=False, attention_mask=mask)
    want = model.generate(ids, **options)
    with record() as entries:
        assert torch.equal(patch(model, EVERYTHING["adaptive"]).generate(ids, **options), want)
    assert [e.path for e in entries] == ["sparse" if length == 97 else "window"] * 2 + ["dense"] * 18


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("lengths", [[150, 150], [150, 60]], ids=str)
def test_chunked_prefill_across_a_sliding_window(lengths, static):
    """Chunks with keys before the first that is kept, and with rows that are nothing but padding yet."""
    model = make("Mistral", sliding_window=48)
    ids, mask = left_padded(lengths, 150)
    want = logits(model, ids, attention_mask=mask)
    patch(model, EVERYTHING["adaptive"])
    kind = transformers.StaticCache if static else transformers.DynamicCache
    cache = kind(config=model.config, **dict(max_cache_len=160) if static else {})
    begin, got = 0, []
    with record() as entries:
        for chunk in ids.split([30, 40, 1, 60, 5, 14], 1):
            begin += chunk.shape[1]
            got.append(logits(model, chunk, past_key_values=cache, attention_mask=mask[:, :begin]))
    close(torch.cat(got, 1)[mask.bool()], want[mask.bool()])
    assert [e.path for e in entries[::2]] == ["dense", "window", "dense", "window", "window", "window"]
    assert [e.nk for e in entries[::2]] == [30, 70, 48, 107, 52, 61]


def test_a_window_that_the_mask_does_not_have_is_not_guessed():
    model = patch(make("Mistral", sliding_window=None))
    model.config.sliding_window = 100
    layer, q, k = model.model.layers[0].self_attn, torch.randn(1, 4, 150, 16), torch.randn(1, 2, 150, 16)
    with pytest.warns(RuntimeWarning, match="because of a sliding window that the mask does not have"), torch.no_grad():
        forward.headstart_attention(layer, q, k, k, headstart_mask(1, 150, 150), sliding_window=100)
    with torch.no_grad():
        forward.headstart_attention(layer, q, k, k, headstart_mask(1, 150, 150), sliding_window=150)


# --- packed sequences ------------------------------------------------------------------------------------------------


def packing(*rows):
    """position_ids that restart, and cumulative lengths, of rows of packed sequences."""
    lengths = torch.tensor([length for row in rows for length in row])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return positions, dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=longest, max_length_k=longest)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [[[100, 50]], [[1, 70, 79]], [[149, 1], [60, 90]], [[150], [65, 85]]], ids=str)
@pytest.mark.parametrize("family, window", [("Llama", None), ("Mistral", 64), ("Mistral", 4096)])
def test_packed_sequences(family, window, rows, attn):
    model = make(family, attn, **{} if window is None else dict(sliding_window=window))
    positions, told = packing(*rows)
    ids = tokens(len(rows))
    options = dict(position_ids=positions, use_cache=False)
    want = logits(model, ids, **options)
    alone = [
        logits(model, ids[r : r + 1, end - n : end])[0]
        for r, row in enumerate(rows)
        for n, end in zip(row, itertools.accumulate(row))
    ]
    close(want.flatten(0, 1), torch.cat(alone))
    patch(model, EVERYTHING["adaptive"])
    with record() as entries:
        close(logits(model, ids, **options), want)
        close(logits(model, ids, **options, **told), want)
    lengths = [n for row in rows for n in row]
    paths = ["window" if window and n > window else "sparse" if n >= 64 else "dense" for n in lengths]
    assert [(e.nq, e.nk, e.path) for e in entries] == [(n, n, path) for n, path in zip(lengths, paths)] * 4


def test_each_packed_sequence_is_sparse_or_dense_by_its_own_length():
    model = make()
    options = dict(position_ids=packing([110, 40])[0], use_cache=False)
    narrow = PrefillPlan.uniform("a_shape", sink=1, local=1)
    first, second = tokens(1).split([110, 40], 1)
    want = torch.cat([logits(patch(model, narrow), first), logits(patch(model, "dense"), second)], 1)
    with record() as entries:
        close(logits(patch(model, narrow), tokens(1), **options), want)
    assert [e.path for e in entries] == ["sparse", "dense"] * 2


@pytest.mark.parametrize("case", ["other lengths", "a cache", "no positions", "a list"])
def test_lengths_that_the_mask_contradicts_run_the_models_own_attention(case):
    model = make()
    positions, told = packing([100, 50])
    options = dict(position_ids=positions, use_cache=False) | told
    if case == "other lengths":
        options["cu_seq_lens_k"] = torch.tensor([0, 50, 150], dtype=torch.int32)
    elif case == "a cache":
        options["use_cache"] = True
    elif case == "no positions":
        del options["position_ids"]
    else:
        options["cu_seq_lens_q"] = options["cu_seq_lens_q"].tolist()
    want = logits(model, tokens(1), **options)
    patch(model, EVERYTHING["adaptive"])
    with pytest.warns(RuntimeWarning, match=r"because of cu_seq_lens_[qk] that the mask contradicts") as caught:
        assert torch.equal(logits(model, tokens(1), **options), want)
        assert torch.equal(logits(model, tokens(1), **options), want)
    assert sum("own attention" in str(w.message) for w in caught) == 1


def test_lengths_of_one_sequence_a_row_are_no_packing():
    model = make()
    want = logits(model, tokens())
    cu = torch.tensor([0, 150, 300], dtype=torch.int32)
    with record() as entries:
        close(logits(patch(model, EVERYTHING["adaptive"]), tokens(), cu_seq_lens_q=cu, cu_seq_lens_k=cu), want)
    assert [e.path for e in entries] == ["sparse"] * 2


def test_positions_that_flash_attention_would_split_at_are_not_ignored():
    mask, positions = headstart_mask(1, 150, 150), packing([100, 50])[0]
    given = dict(position_ids=positions)
    assert forward._contradiction(mask, given, "sdpa") is None
    assert "position_ids that restart" in forward._contradiction(mask, given, "flash_attention_2")
    assert forward._contradiction(mask, dict(position_ids=torch.arange(150)[None]), "flash_attention_2") is None


def test_many_short_sequences_are_attended_at_once():
    model = make()
    options = dict(position_ids=packing([5] * 30)[0], use_cache=False)
    want = logits(model, tokens(1), **options)
    with record() as entries:
        assert torch.equal(logits(patch(model, EVERYTHING["adaptive"]), tokens(1), **options), want)
    assert entries == []
    assert forward.splitting_pays(1000, 1, 50_000) and not forward.splitting_pays(6, 1, 150)


# --- the model's own attention gets its own mask ---------------------------------------------------------------------


def test_a_static_cache_that_counts_on_does_not_move_the_mask():
    """Its offset is a tensor, which it adds to before the first layer asks for the mask."""
    model = make()
    ids, mask = tokens(), torch.ones(2, 150, dtype=torch.long)
    mask[1, 60:70] = 0

    def run():
        cache = transformers.StaticCache(config=model.config, max_cache_len=160)
        first = logits(model, ids[:, :100], past_key_values=cache, attention_mask=mask[:, :100])
        return torch.cat([first, logits(model, ids[:, 100:], past_key_values=cache, attention_mask=mask)], 1)

    want = run()
    patch(model, EVERYTHING["adaptive"])
    with pytest.warns(RuntimeWarning, match="padding that is not on the left"):
        assert torch.equal(run(), want)
