"""Makes smollm2-llamacpp.bin: what llama.cpp says about SmolLM2-135M-Instruct (Q4_1), for the engine to be held to.

    cat some.txt other.txt > text.txt      # at least --chunks * 512 tokens of ordinary prose
    llama-perplexity -m SmolLM2-135M-Instruct.Q4_1.gguf -f text.txt -c 512 -b 512 -t 1 --chunks 8 \
        --kl-divergence-base logits.kld
    python llamacpp_logits.py logits.kld smollm2-llamacpp.bin --chunks 2 --top 64

llama-perplexity writes the log-probabilities of the whole vocabulary for the second half of every chunk (200 MB for
8 chunks of 512). `cargo run --release -p forebay-engine --example kl_divergence` compares with that file itself; this
script condenses a part of it for the test that runs everywhere.

Input (llama.cpp, tools/perplexity, `--kl-divergence-base`), little endian: `_logits_`, u32 n_ctx, i32 n_vocab,
i32 n_chunk, i32 tokens[n_chunk][n_ctx], then per chunk and per position n_ctx/2 .. n_ctx-2: f32 scale, f32 min,
u16 q[n_vocab] (padded to an even count); log p = min + scale * q, and q = 0 is "at most min".

Output, little endian: `FBTOPLP1`, u32 n_ctx, u32 n_chunk, u32 top, u16 tokens[n_chunk][n_ctx], then per chunk and
position as above: u16 ids[top], f32 log_p[top], most likely first.
"""

import argparse
import struct

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("base")
parser.add_argument("out")
parser.add_argument("--chunks", type=int, default=2)
parser.add_argument("--top", type=int, default=64)
args = parser.parse_args()

with open(args.base, "rb") as f:
    assert f.read(8) == b"_logits_"
    n_ctx, n_vocab, n_chunk = struct.unpack("<Iii", f.read(12))
    tokens = np.fromfile(f, np.int32, n_chunk * n_ctx).reshape(n_chunk, n_ctx)
    assert args.chunks <= n_chunk and n_vocab <= 65536
    positions = n_ctx - 1 - n_ctx // 2
    row = 4 + 2 * ((n_vocab + 1) // 2)
    with open(args.out, "wb") as out:
        out.write(b"FBTOPLP1" + struct.pack("<III", n_ctx, args.chunks, args.top))
        tokens[: args.chunks].astype("<u2").tofile(out)
        for _ in range(args.chunks * positions):
            raw = np.fromfile(f, np.uint16, row)
            scale, low = raw[:4].view(np.float32)
            log_p = low + scale * raw[4 : 4 + n_vocab].astype(np.float32)
            ids = np.argsort(-log_p, kind="stable")[: args.top]
            out.write(ids.astype("<u2").tobytes() + log_p[ids].astype("<f4").tobytes())
print(f"{args.chunks} chunks of {n_ctx}, {positions} positions each, top {args.top}")
