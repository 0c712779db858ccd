/* Runs llama.cpp over token ids and writes their log-probabilities in the format of llama-perplexity's
 * --kl-divergence-base, described in llamacpp_logits.py.
 *
 *     cc -O2 -o llamacpp_ids llamacpp_ids.c -I llama.cpp/include -I llama.cpp/ggml/include -L llama.cpp/build/bin \
 *         -lllama -lm
 *     ./llamacpp_ids MODEL.gguf tokens.kld logits.kld FLASH_ATTENTION(0|1) UBATCH
 *
 * Takes the tokens from the start of a file of that format (conversations.py makes one without logits).
 * llama-perplexity itself cannot: it reads text, and takes <|im_start|> in it for eleven characters.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "llama.h"

static void die(const char *what) {
    fprintf(stderr, "llamacpp_ids: %s\n", what);
    exit(1);
}

static void write_row(FILE *out, const float *logits, uint32_t vocab, uint16_t *q) {
    double max = logits[0], min = logits[0], sum = 0;
    for (uint32_t id = 0; id < vocab; id++) {
        max = fmax(max, logits[id]);
        min = fmin(min, logits[id]);
    }
    for (uint32_t id = 0; id < vocab; id++) sum += exp(logits[id] - max);
    const double log_sum = max + log(sum), low = fmax(min, max - 16) - log_sum;
    const float head[2] = {(float)((max - log_sum - low) / 65535), (float)low};
    for (uint32_t id = 0; id < vocab; id++) {
        const double log_p = logits[id] - log_sum;
        q[id] = log_p > low ? (uint16_t)lrint(fmin((log_p - low) / head[0], 65535)) : 0;
    }
    fwrite(head, 4, 2, out);
    fwrite(q, 2, (vocab + 1) / 2 * 2, out);
}

int main(int argc, char **argv) {
    if (argc != 6) die("usage: llamacpp_ids MODEL.gguf tokens.kld logits.kld FLASH_ATTENTION UBATCH");
    FILE *in = fopen(argv[2], "rb"), *out = fopen(argv[3], "wb");
    char magic[8];
    uint32_t size[3];
    if (!in || !out) die("cannot open a file");
    if (fread(magic, 1, 8, in) != 8 || fread(size, 4, 3, in) != 3) die("the tokens end early");
    const uint32_t context = size[0], vocab = size[1], chunks = size[2];
    const size_t count = (size_t)context * chunks;
    int32_t *tokens = malloc(count * 4);
    uint16_t *q = calloc(vocab + 1, 2);
    if (!tokens || !q || fread(tokens, 4, count, in) != count) die("the tokens end early");

    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) die("cannot load the model");
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = context;
    params.n_ubatch = (uint32_t)atoi(argv[5]);
    params.n_threads = params.n_threads_batch = 1;
    params.flash_attn_type = atoi(argv[4]) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    struct llama_context *ctx = llama_init_from_model(model, params);
    if (!ctx) die("cannot make a context");

    fwrite(magic, 1, 8, out);
    fwrite(size, 4, 3, out);
    fwrite(tokens, 4, count, out);
    struct llama_batch batch = llama_batch_init((int32_t)context, 0, 1);
    for (uint32_t chunk = 0; chunk < chunks; chunk++) {
        llama_memory_clear(llama_get_memory(ctx), true);
        batch.n_tokens = (int32_t)context;
        for (uint32_t at = 0; at < context; at++) {
            batch.token[at] = tokens[chunk * context + at];
            batch.pos[at] = (llama_pos)at;
            batch.n_seq_id[at] = 1;
            batch.seq_id[at][0] = 0;
            batch.logits[at] = at >= context / 2 && at < context - 1;
        }
        if (llama_decode(ctx, batch)) die("decoding failed");
        for (uint32_t at = context / 2; at < context - 1; at++) {
            write_row(out, llama_get_logits_ith(ctx, (int32_t)at), vocab, q);
        }
    }
    return fclose(out) ? 1 : 0;
}
