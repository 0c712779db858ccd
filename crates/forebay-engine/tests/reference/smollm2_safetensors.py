"""SmolLM2 from GGUF to a Hugging Face directory: `python smollm2_safetensors.py GGUF OUT_DIR`.

The directory holds the weights of the GGUF, dequantised and rounded to bfloat16, so that an engine that reads only safetensors can be
compared with one that reads the GGUF. Needs `pip install gguf` (which brings numpy).
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize

CONTROL = 3
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`; a name that isn't known is a KeyError."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("blk."):
        return TOP_NAMES[stem] + ".weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{BLOCK_NAMES[part]}.weight"


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in Hugging Face's order: a rotation pairs rows half a head apart; llama.cpp has them side by side."""
    dim = rows.shape[0] // heads
    return rows.reshape(heads, dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def bf16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of each finite float32, ties to even, as its 16 bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes bfloat16 bits; the data begins at a multiple of 8 bytes, without gaps."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, bits in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [at, at + bits.nbytes]}
        at += bits.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for bits in tensors.values():
            out.write(bits.tobytes())


def config(field, tied: bool) -> dict:
    heads = field("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.embedding_length") // heads,
        "max_position_embeddings": field("llama.context_length"),
        # GGUF keeps float32: 9.999999747378752e-06 is 1e-05.
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field("llama.rope.freq_base"),
        "rope_scaling": None,
        "vocab_size": field("llama.vocab_size"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def tokenizer(field) -> tuple[dict, dict]:
    """`tokenizer.json` and `tokenizer_config.json`."""
    if field("tokenizer.ggml.pre") != "smollm":
        raise SystemExit(f"pre-tokenizer `{field('tokenizer.ggml.pre')}` is not that of SmolLM2")
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {i: {"content": tokens[i], **flags} for i, kind in enumerate(kinds) if kind == CONTROL}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    main = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": field("tokenizer.ggml.merges"),
        },
    }
    named = {
        name: tokens[field(f"tokenizer.ggml.{key}_token_id")]
        for name, key in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": field("llama.context_length"),
        "added_tokens_decoder": {str(i): token for i, token in special.items()},
        "chat_template": field("tokenizer.chat_template"),
        **named,
    }
    return main, settings


def convert(gguf: Path, out: Path) -> None:
    reader = GGUFReader(gguf)

    def field(name: str):
        if name not in reader.fields:
            raise SystemExit(f"{gguf}: no `{name}`: not a GGUF of SmolLM2")
        return reader.fields[name].contents()

    heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = unpermute(values, heads[part])
        tensors[hf_name(tensor.name)] = bf16(values)

    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out / "model.safetensors", tensors)
    settings = config(field, tied="lm_head.weight" not in tensors)
    main, tokenizer_settings = tokenizer(field)
    ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {
        "config.json": settings,
        "generation_config.json": ids,
        "tokenizer.json": main,
        "tokenizer_config.json": tokenizer_settings,
        "special_tokens_map.json": {k: v for k, v in tokenizer_settings.items() if k.endswith("_token")},
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: smollm2_safetensors.py GGUF OUT_DIR")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
