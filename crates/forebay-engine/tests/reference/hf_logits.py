"""What the same weights give without quantised arithmetic: Hugging Face transformers in f32 on the dequantised model.

    pip install torch transformers gguf numpy
    python hf_logits.py SmolLM2-135M-Instruct.Q4_1.gguf logits.kld logits-f32.kld
    python llamacpp_logits.py logits-f32.kld smollm2-f32.bin --chunks 1 --top 64

Takes the tokens from llama-perplexity's file (see llamacpp_logits.py) and writes a file of the same format.
"""

import struct
import sys

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

model_path, base_path, out_path = sys.argv[1:]
reader = gguf.GGUFReader(model_path)


def key(name):
    return reader.fields[f"llama.{name}"].contents()


layers, heads, kv_heads = key("block_count"), key("attention.head_count"), key("attention.head_count_kv")
weights = {
    t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape([int(n) for n in t.shape][::-1]).astype(np.float32)
    for t in reader.tensors
}
vocab = weights["token_embd.weight"].shape[0]
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=vocab,
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=key("context_length"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": key("rope.freq_base")},
        attn_implementation="eager",
    )
).eval()


def unpermute(w, n):
    """From interleaved to half-split rotation."""
    return w.reshape(n, w.shape[0] // n // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


state = {
    "model.embed_tokens.weight": weights["token_embd.weight"],
    "lm_head.weight": weights["token_embd.weight"],
    "model.norm.weight": weights["output_norm.weight"],
}
for n in range(layers):
    hf, ours = f"model.layers.{n}.", f"blk.{n}."
    state[hf + "self_attn.q_proj.weight"] = unpermute(weights[ours + "attn_q.weight"], heads)
    state[hf + "self_attn.k_proj.weight"] = unpermute(weights[ours + "attn_k.weight"], kv_heads)
    for theirs, name in [
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ]:
        state[f"{hf}{theirs}.weight"] = weights[f"{ours}{name}.weight"]
model.load_state_dict({k: torch.tensor(np.ascontiguousarray(v)) for k, v in state.items()})

with open(base_path, "rb") as base, open(out_path, "wb") as out:
    head = base.read(20)
    n_ctx, n_vocab, n_chunk = struct.unpack("<Iii", head[8:])
    raw = base.read(4 * n_ctx * n_chunk)
    out.write(head + raw)
    for chunk in np.frombuffer(raw, np.int32).reshape(n_chunk, n_ctx):
        with torch.no_grad():
            hidden = model.model(torch.tensor(chunk[None].astype(np.int64))).last_hidden_state[0]
            log_p = model.lm_head(hidden[n_ctx // 2 : n_ctx - 1]).double().log_softmax(-1).float().numpy()
        for row in log_p:
            low = max(row.min(), row.max() - 16)
            scale = (row.max() - low) / 65535
            quants = np.where(row > low, np.rint((row - low) / scale), 0).astype(np.uint16)
            out.write(np.array([scale, low], np.float32).tobytes() + quants.tobytes())
