"""A random and small model as a Hugging Face directory, with a real tokenizer of 684 tokens."""

from __future__ import annotations

import array
import json
import random
import shutil
from pathlib import Path

TOKENIZER = Path(__file__).parents[2] / "crates/forebay-tokens/tests/fixtures/tiny.json"
DIM, FFN, LAYERS, HEADS, KV_HEADS, VOCAB = 64, 96, 2, 4, 2, 704
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": DIM,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def shapes() -> dict[str, list[int]]:
    kv = DIM // HEADS * KV_HEADS
    found = {"model.embed_tokens.weight": [VOCAB, DIM], "model.norm.weight": [DIM]}
    for n in range(LAYERS):
        for name, shape in {
            "input_layernorm": [DIM],
            "post_attention_layernorm": [DIM],
            "self_attn.q_proj": [DIM, DIM],
            "self_attn.k_proj": [kv, DIM],
            "self_attn.v_proj": [kv, DIM],
            "self_attn.o_proj": [DIM, DIM],
            "mlp.gate_proj": [FFN, DIM],
            "mlp.up_proj": [FFN, DIM],
            "mlp.down_proj": [DIM, FFN],
        }.items():
            found[f"model.layers.{n}.{name}.weight"] = shape
    return found


def write_weights(path: Path, tensors: dict[str, list[int]]) -> None:
    """Random F32 weights; norms around one."""
    source = random.Random(7)
    header, data = {}, b""
    for name, shape in tensors.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        centre = 1.0 if len(shape) == 1 else 0.0
        values = array.array("f", (centre + source.uniform(-0.3, 0.3) for _ in range(count))).tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def make(directory: Path) -> None:
    """In two shards."""
    directory.mkdir()
    write_json(directory / "config.json", CONFIG)
    shutil.copy(TOKENIZER, directory / "tokenizer.json")
    write_json(directory / "tokenizer_config.json", {"bos_token": "<|endoftext|>"})
    write_json(directory / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    names = list(shapes())
    shards = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, part in shards.items():
        write_weights(directory / file, {name: shapes()[name] for name in part})
    index = {name: file for file, part in shards.items() for name in part}
    write_json(directory / "model.safetensors.index.json", {"weight_map": index})
