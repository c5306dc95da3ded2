"""GGUF files: their blocks bit for bit, packed models against plain ones, and damaged files by name."""

from __future__ import annotations

import copy
import struct

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import headstart  # noqa: E402
from headstart.model.load import load_model  # noqa: E402
from headstart.ops.int4_gemm import Int4Weight  # noqa: E402
from headstart.reference import gguf as reference  # noqa: E402
from headstart.weights.gguf_file import GgufFile  # noqa: E402
from headstart.weights.int4_linear import Int4Embedding  # noqa: E402
from models import logits, tokens  # noqa: E402
from supported import GGUF_ARCHITECTURES  # noqa: E402
from supported import GGUF_KINDS as KINDS  # noqa: E402

assert set(KINDS) == set(reference.KINDS)
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where they are
HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, WORDS = 256, 2, 1, 512, 288


def random_blocks(kind: str, n: int, k: int, seed: int = 0) -> np.ndarray:
    """Bytes [n, bytes of a row] of random codes and small scales."""
    generator = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rows = generator.integers(0, 256, (n, k // block, size), dtype=np.uint8)
    for at in HALVES[kind]:
        values = generator.uniform(1e-4, 1e-3, rows.shape[:2]).astype(np.float16)
        rows[..., at : at + 2] = values[..., None].view(np.uint8)
    return rows.reshape(n, -1)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_what_the_package_reads(kind):
    rows = random_blocks(kind, 37, 768)
    rows.reshape(-1)[:] = np.random.default_rng(1).permutation(rows.reshape(-1))  # scales of every size, of both signs
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    for at in HALVES[kind]:
        rows.reshape(37, -1, block)[..., at + 1] &= 0xBF  # but finite
    want = torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[kind]))
    weight = Int4Weight.from_gguf(torch.from_numpy(rows), kind)
    assert same_bits(weight.dequantize(), want)
    assert same_bits(reference.dequantize(kind, torch.from_numpy(rows)), want)
    x = torch.randn(3, 768)
    torch.testing.assert_close(headstart.int4_gemm(x, weight), x @ want.T, rtol=1e-4, atol=1e-4 * want.abs().max())


def test_wrong_blocks():
    rows = torch.zeros(3, 36, dtype=torch.uint8)
    with pytest.raises(ValueError, match="from_gguf: kind: expected one of Q4_0, .*, got 'Q2_K'"):
        Int4Weight.from_gguf(rows, "Q2_K")
    with pytest.raises(ValueError, match="from_gguf: rows: expected rows of whole blocks of 20 bytes, got 36"):
        Int4Weight.from_gguf(rows, "Q4_1")
    with pytest.raises(ValueError, match=r"from_gguf: rows: expected uint8 \[N, bytes\], got int32 \[3, 36\]"):
        Int4Weight.from_gguf(rows.int(), "Q4_0")


# --- models ----------------------------------------------------------------------------------------------------------

Q, K, F16 = "Q6_K", "Q4_K", "F16"


def write_model(path, kind: str, mixed: bool = True) -> None:
    """A small model with random weights, as llama.cpp writes it."""
    name, _, tied = kind.partition(", ")
    writer = gguf.GGUFWriter(path, name)
    writer.add_name("a small model")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_value_length(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    words = ["<s>", "</s>", *(chr(0x100 + i) for i in range(WORDS - 3)), chr(0x100) + chr(0x101)]
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (WORDS - 2))
    writer.add_token_merges([f"{words[2]} {words[3]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator, seed = np.random.default_rng(0), iter(range(1000))

    def norm(tensor, size=HIDDEN):
        writer.add_tensor(tensor, generator.uniform(0.5, 1.5, size).astype(np.float32))

    def weight(tensor, n, k, kind):
        if kind == F16:
            writer.add_tensor(tensor, (generator.standard_normal((n, k)) / 16).astype(np.float16))
        else:
            rows = random_blocks(kind, n, k, next(seed))
            writer.add_tensor(tensor, rows, raw_dtype=gguf.GGMLQuantizationType[kind])

    head = HIDDEN // HEADS
    weight("token_embd.weight", WORDS, HIDDEN, "Q8_0")
    norm("output_norm.weight")
    if not tied and name != "gemma2":
        weight("output.weight", WORDS, HIDDEN, Q)
    for i in range(2):
        layer, kinds = f"blk.{i}", iter(KINDS if mixed else ["Q4_1"] * 6)
        weight(f"{layer}.attn_q.weight", HEADS * head, HIDDEN, next(kinds))
        weight(f"{layer}.attn_k.weight", KV_HEADS * head, HIDDEN, next(kinds))
        weight(f"{layer}.attn_v.weight", KV_HEADS * head, HIDDEN, F16 if mixed and i else next(kinds))
        weight(f"{layer}.attn_output.weight", HIDDEN, HEADS * head, next(kinds))
        weight(f"{layer}.ffn_gate.weight", FEED_FORWARD, HIDDEN, next(kinds))
        weight(f"{layer}.ffn_up.weight", FEED_FORWARD, HIDDEN, next(kinds))
        weight(f"{layer}.ffn_down.weight", HIDDEN, FEED_FORWARD, K)
        norm(f"{layer}.attn_norm.weight")
        norm(f"{layer}.ffn_norm.weight")
        if name == "qwen2":
            for part, size in (("q", HEADS * head), ("k", KV_HEADS * head), ("v", KV_HEADS * head)):
                norm(f"{layer}.attn_{part}.bias", size)
        if name == "qwen3":
            norm(f"{layer}.attn_q_norm.weight", head)
            norm(f"{layer}.attn_k_norm.weight", head)
        if name == "gemma2":
            norm(f"{layer}.post_attention_norm.weight")
            norm(f"{layer}.post_ffw_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=GGUF_ARCHITECTURES)
def model_file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_model(path, request.param)
    return path


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_model(path, "llama, tied")
    return path


def test_a_plain_model_is_what_transformers_opens(model_file):
    config = transformers.GgufConfig(dequantize=True)
    options = {"gguf_file": model_file.name, "dtype": torch.float32, "quantization_config": config}
    want = transformers.AutoModelForCausalLM.from_pretrained(model_file.parent, **options)
    got = headstart.load(model_file, packed=False, dtype=torch.float32)
    assert type(got) is type(want) and got.state_dict().keys() == want.state_dict().keys()
    assert all(torch.equal(x, want.state_dict()[name]) for name, x in got.state_dict().items())
    assert not hasattr(got.config, "quantization_config")
    assert headstart.load(model_file, packed=False).dtype == torch.bfloat16


def test_a_packed_model_has_the_values_of_the_plain_one(model_file):
    plain = headstart.load(model_file, packed=False, dtype=torch.float32)
    packed = headstart.load(model_file, dtype=torch.float32)
    layers = {name: m for name, m in packed.named_modules() if isinstance(m, headstart.Int4Linear)}
    assert len(layers) >= 13 and "lm_head" in layers
    assert isinstance(packed.lm_head, headstart.Int4Linear) and packed.lm_head.bits == 8
    for name, layer in layers.items():
        own = plain.get_submodule(name.removesuffix(".linear"))
        assert torch.equal(layer.weight_int4.dequantize(), own.weight)
        assert (layer.bias is None) == (getattr(own, "bias", None) is None)
        assert layer.bias is None or torch.equal(layer.bias, own.bias)
    others = {name: x for name, x in plain.state_dict().items() if "norm" in name}
    assert others and all(torch.equal(x, packed.state_dict()[name]) for name, x in others.items())
    ids = tokens()
    assert torch.equal(packed.get_input_embeddings()(ids), plain.get_input_embeddings()(ids))
    got, want = logits(packed, ids), logits(plain, ids)
    assert (got - want).norm() < 1e-4 * want.norm()
    assert packed.dtype == torch.float32 and headstart.load(model_file).dtype == torch.bfloat16


def test_a_packed_model_is_saved_and_opened(model_file, tmp_path):
    model = headstart.load(model_file)
    model.save_pretrained(tmp_path)
    want = logits(model, tokens())
    for again in (headstart.load(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(again, tokens()), want) and again.dtype == torch.bfloat16
        assert type(again.get_input_embeddings()) is type(model.get_input_embeddings())
        own = dict(model.named_parameters())
        assert all(torch.equal(x, own[name]) for name, x in again.named_parameters())
    streamed = headstart.load(tmp_path, memory_budget="10MB")
    assert torch.equal(logits(streamed, tokens()), want)
    out = model.generate(tokens()[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(tokens()[:1], max_new_tokens=4, do_sample=False), out)


def test_a_tied_weight_is_in_the_model_once(llama_file):
    model = headstart.load(llama_file)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, Int4Embedding) and list(embedding.state_dict()) == []
    assert embedding.weight_int4.packed.data_ptr() == model.lm_head.packed.data_ptr()
    other = copy.deepcopy(model)
    other.lm_head.scales.data.mul_(2)
    ids = tokens()
    assert torch.equal(other.get_input_embeddings()(ids), 2 * embedding(ids))
    model.tie_weights()  # transformers has nothing to tie
    assert torch.equal(
        model.to(torch.float32).get_input_embeddings()(ids).bfloat16(), other.get_input_embeddings()(ids) / 2
    )
    assert model.dtype == torch.float32
    with pytest.raises(IndexError):
        embedding(torch.tensor([WORDS + 40]))


def test_an_untied_embedding_has_a_weight_of_its_own(tmp_path):
    write_model(tmp_path / "model.gguf", "llama")
    model = headstart.load(tmp_path / "model.gguf")
    embedding = model.get_input_embeddings()
    assert embedding.linear.bits == 8 and embedding.linear is not model.lm_head
    assert not torch.equal(embedding.weight_int4.dequantize(), model.lm_head.weight_int4.dequantize())


def test_a_patched_packed_model(llama_file):
    model, plain = headstart.load(llama_file, dtype=torch.float32), headstart.load(llama_file, packed=False)
    want = logits(model, tokens())
    headstart.patch(model)
    torch.testing.assert_close(logits(model, tokens()), want, rtol=1e-3, atol=1e-3)
    headstart.unpatch(model)
    assert torch.equal(logits(model, tokens()), want) and plain.dtype == torch.bfloat16


def test_without_the_tables_transformers_opens_the_file(llama_file, monkeypatch):
    """A later release of transformers may have no such module; the file still opens, with plain weights."""
    want = headstart.load(llama_file, packed=False).state_dict()
    monkeypatch.setattr("headstart.weights.sources.gguf._tables", lambda: None)
    got = headstart.load(llama_file).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(x, want[name]) for name, x in got.items())


def test_quantize_reads_the_plain_weights(llama_file, tmp_path):
    headstart.quantize(llama_file, tmp_path / "out", group_size=32)
    again = headstart.load(tmp_path / "out")
    want = headstart.load(llama_file, packed=False)
    layer = again.model.layers[0].mlp.up_proj
    assert torch.equal(
        layer.weight_int4.codes(), Int4Weight.quantize(want.model.layers[0].mlp.up_proj.weight.detach(), 32).codes()
    )


def test_the_tokenizer(llama_file):
    _, tokenizer = load_model(llama_file)
    want = transformers.AutoTokenizer.from_pretrained(llama_file.parent, gguf_file=llama_file.name)
    text = "".join(chr(0x100 + i) for i in range(9))
    assert type(tokenizer) is type(want) and tokenizer(text).input_ids == want(text).input_ids
    assert tokenizer.special_tokens_map == want.special_tokens_map


# --- damaged files ---------------------------------------------------------------------------------------------------


def changed(path, tmp_path, old: bytes, new: bytes):
    content = path.read_bytes()
    assert content.count(old) >= 1 and len(old) == len(new)
    (tmp_path / "bad.gguf").write_bytes(content.replace(old, new, 1))
    return tmp_path / "bad.gguf"


def entry(name: str, shape, kind: str) -> bytes:
    """What a tensor's entry begins with."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return name.encode() + sizes + struct.pack("<I", gguf.GGMLQuantizationType[kind])


EMBEDDING = entry("token_embd.weight", (WORDS, HIDDEN), "Q8_0")


@pytest.mark.parametrize(
    "old, new, said",
    [
        (b"GGUF", b"GGML", r"magic: expected GGUF, got b'GGML'"),
        (struct.pack("<I", 3), struct.pack("<I", 1), "version: expected 2 or 3, got 1"),
        (EMBEDDING, EMBEDDING[:-4] + struct.pack("<I", 99), "token_embd.weight: kind: expected one that .*, got 99"),
        (
            EMBEDDING,
            entry("token_embd.weight", (WORDS, HIDDEN + 1), "Q8_0"),
            r"token_embd.weight: shape: expected rows of whole blocks of 32, as Q8_0 has, got \[288, 257\]",
        ),
        (
            EMBEDDING,
            entry("token_embd.weight", (WORDS + 32, HIDDEN), "Q8_0"),
            r"embe?d.*: expected \[288, 256\].*, got \[320, 256\]",
        ),
        (
            EMBEDDING,
            entry("token_embd.weight", (2**40, HIDDEN), "Q8_0"),
            "token_embd.weight: expected data up to byte .*, got a file of .* bytes: it is cut short",
        ),
        (b"general.architecture", b"general.architectura", "general.architecture: expected a name, got None"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lambs", "architecture: expected one that transformers"),
        (b"blk.0.attn_norm", b"blk.0.attn_n0rm", "0.input_layernorm.weight: expected a tensor, which no file has"),
    ],
)  # fmt: skip
def test_a_wrong_file(llama_file, tmp_path, old, new, said):
    path = changed(llama_file, tmp_path, old, new)
    for packed in (True, False):
        with pytest.raises(ValueError, match=said) as error:
            headstart.load(path, packed=packed)
        assert str(path) in str(error.value)


def test_a_file_that_is_cut(llama_file, tmp_path):
    content, path = llama_file.read_bytes(), tmp_path / "cut.gguf"
    for length in (0, 3, 4, 20, 24, 100, 1000, 3000, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut.gguf: ") as error:
            headstart.load(path)
        assert len(str(error.value)) < 300


def test_a_header_with_any_bytes_flipped(llama_file, tmp_path):
    """It opens, or the error is one of ours: nothing is half read, nothing runs long."""
    content = bytearray(llama_file.read_bytes())
    end, generator, path = (
        min(t.begin for t in GgufFile(llama_file).tensors.values()),
        np.random.default_rng(0),
        tmp_path / "x",
    )
    for _ in range(300):
        flipped = content.copy()
        for at in generator.integers(0, end, 2):
            flipped[at] = generator.integers(0, 256)
        path.write_bytes(flipped)
        try:
            GgufFile(path)
        except ValueError as error:
            assert str(error).startswith(str(path))
