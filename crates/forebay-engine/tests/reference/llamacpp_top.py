"""Makes gemma3-f32.json: what llama.cpp says about a text with Gemma 3 270M's weights dequantised.

    cat some.txt other.txt > text.txt      # at least 2048 tokens of ordinary prose
    llama-quantize --allow-requantize gemma-3-270m-q4_k_m.gguf gemma-f32.gguf F32
    llama-perplexity -m gemma-f32.gguf -f text.txt -c 1024 -b 1024 -fa off --chunks 1 --kl-divergence-base logits.kld
    python llamacpp_top.py logits.kld gemma3-f32.json --bos 2

The context is twice the model's window. Of every second position of its second half, the most likely tokens. The input
is described in llamacpp_logits.py; ids of this vocabulary do not fit the 16 bits of that script's output.
"""

import argparse
import json
import struct

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("base")
parser.add_argument("out")
parser.add_argument("--bos", type=int, required=True)
parser.add_argument("--top", type=int, default=8)
args = parser.parse_args()

with open(args.base, "rb") as f:
    assert f.read(8) == b"_logits_"
    n_ctx, n_vocab, n_chunk = struct.unpack("<Iii", f.read(12))
    tokens = np.fromfile(f, np.int32, n_chunk * n_ctx)[:n_ctx]
    # llama-perplexity does so when it computes, and does not write it.
    tokens[0] = args.bos
    positions = []
    for at in range(n_ctx // 2, n_ctx - 1):
        raw = np.fromfile(f, np.uint16, 4 + 2 * ((n_vocab + 1) // 2))
        scale, low = raw[:4].view(np.float32)
        log_p = low + scale * raw[4 : 4 + n_vocab].astype(np.float32)
        ids = np.argsort(-log_p, kind="stable")[: args.top]
        if at % 2 == 0:
            positions.append({"at": at, "top": [[int(i), round(float(log_p[i]), 5)] for i in ids]})
text = json.dumps({"tokens": tokens.tolist(), "positions": positions}, separators=(",", ":"))
open(args.out, "w").write(text + "\n")
print(len(positions), "positions")
