"""The converted directory loads in transformers and computes what SmolLM2 does.

By hand (CI doesn't have these packages): `pip install gguf transformers safetensors jinja2 pytest`, then
`FOREBAY_TEST_MODEL=smollm2.gguf python -m pytest crates/forebay-engine/tests/reference`.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from smollm2_safetensors import bf16, convert, hf_name, unpermute


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "smollm2"
    convert(Path(os.environ["FOREBAY_TEST_MODEL"]), out)
    return out


@pytest.fixture(scope="session")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def read(directory: Path) -> dict[str, np.ndarray]:
    raw = (directory / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:begin]).items():
        if name != "__metadata__":
            first, end = entry["data_offsets"]
            bits = np.frombuffer(raw[begin + first : begin + end], "<u2").astype(np.uint32) << 16
            tensors[name] = bits.view(np.float32).reshape(entry["shape"])
    return tensors


def logits(config: dict, w: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """The last position's logits: transformers' `modeling_llama.py` in numpy, rotations by halves."""
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    count = len(ids)
    angles = np.outer(np.arange(count), config["rope_theta"] ** (-np.arange(0, dim, 2) / dim))
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w[name + ".weight"]

    def rope(x):
        low, high = x[..., : dim // 2], x[..., dim // 2 :]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    x = w["model.embed_tokens.weight"][ids]
    mask = np.triu(np.full((count, count), -np.inf), 1)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        project = lambda y, name: y @ w[f"{at}{name}.weight"].T  # noqa: E731
        y = norm(x, at + "input_layernorm")
        q = rope(project(y, "self_attn.q_proj").reshape(count, heads, dim))
        k = rope(project(y, "self_attn.k_proj").reshape(count, kv_heads, dim)).repeat(heads // kv_heads, 1)
        v = project(y, "self_attn.v_proj").reshape(count, kv_heads, dim).repeat(heads // kv_heads, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim) + mask
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        x = x + project(np.einsum("hqk,khd->qhd", share, v).reshape(count, -1), "self_attn.o_proj")
        y = norm(x, at + "post_attention_layernorm")
        gate = project(y, "mlp.gate_proj")
        x = x + project(gate / (1 + np.exp(-gate)) * project(y, "mlp.up_proj"), "mlp.down_proj")
    assert config["tie_word_embeddings"]
    return norm(x, "model.norm")[-1] @ w["model.embed_tokens.weight"].T


def test_the_model_knows_paris(directory, tokenizer):
    config = json.loads((directory / "config.json").read_text())
    ids = tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314], "as in tests/smollm2.rs, which reads the GGUF"
    best = int(logits(config, read(directory), ids).argmax())
    assert (best, tokenizer.decode([best])) == (7042, " Paris")


def test_the_library_reads_every_tensor(directory):
    config = json.loads((directory / "config.json").read_text())
    with safe_open(directory / "model.safetensors", "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    assert len(shapes) == 2 + 9 * config["num_hidden_layers"]
    assert shapes["model.embed_tokens.weight"] == [config["vocab_size"], config["hidden_size"]]
    kv = config["num_key_value_heads"] * config["head_dim"]
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == [kv, config["hidden_size"]]


def test_the_tokenizer_has_every_setting(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 2, 0)
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    text = "In 2024: déjà vu 😀\n\n  tabs\tand  'll"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 1 not in ids and 2 not in ids
    assert tokenizer.tokenize("a 12") == ["a", "Ġ", "1", "2"]


def test_the_chat_template_is_there(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(text).count(1) == 3


def test_bf16_rounds_to_the_nearest_and_ties_to_even():
    values = np.array([1.0, -2.5, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    assert [hex(bits) for bits in bf16(values)] == ["0x3f80", "0xc020", "0x3f80", "0x3f82", "0x3f81"]


def test_unpermute_undoes_llama_cpp():
    rows = np.arange(2 * 4 * 3).reshape(8, 3)
    permuted = rows.reshape(2, 2, 2, 3).swapaxes(1, 2).reshape(8, 3)
    assert permuted[:, 0].tolist() == [0, 6, 3, 9, 12, 18, 15, 21]
    assert (unpermute(permuted, 2) == rows).all()


def test_unknown_names_are_not_dropped():
    assert hf_name("blk.12.ffn_up.weight") == "model.layers.12.mlp.up_proj.weight"
    with pytest.raises(KeyError):
        hf_name("rope_freqs.weight")
