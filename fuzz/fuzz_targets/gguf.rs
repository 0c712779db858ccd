//! A model file: directory, model shape, weights, tokenizer and chat template.
//!
//! An input that starts with `GGUF` is a file. Any other is a list of changes to the header of a small valid file,
//! three bytes each (offset, low byte first, and the new byte), after one byte that says where the file is cut off.
#![no_main]

use std::sync::{Arc, LazyLock};

use forebay_engine::gguf::{Gguf, List, Value};
use forebay_engine::model::tiny::TinyLlama;
use forebay_engine::model::{ModelFile, ModelSpec, Shard, Weights};
use forebay_kernels::{Isa, Pool};
use forebay_tokens::{ChatPrompt, Special};
use libfuzzer_sys::fuzz_target;

// The engine keeps this to itself; it is compiled in here, with the one module that it names.
mod gguf {
    pub use forebay_engine::gguf::*;
}
#[path = "../../crates/forebay-engine/src/serve/text.rs"]
mod text;

struct Base {
    file: Vec<u8>,
    header: usize,
}

static BASE: LazyLock<Base> = LazyLock::new(|| {
    let texts = |texts: &[&str]| Value::List(List::Texts(texts.iter().map(|&t| t.to_owned()).collect()));
    let model = TinyLlama {
        layers: 1,
        q_heads: 2,
        kv_heads: 1,
        head_dim: 16,
        ffn_dim: 32,
        vocab_size: 8,
        ..TinyLlama::default()
    };
    let mut writer = model.writer();
    writer
        .put_text("tokenizer.ggml.model", "gpt2")
        .put_text("tokenizer.ggml.pre", "smollm")
        .put("tokenizer.ggml.tokens", &texts(&["<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ", "Ċ", "c"]))
        .put("tokenizer.ggml.merges", &texts(&["a b"]))
        .put("tokenizer.ggml.token_type", &Value::List(List::Ints(vec![3, 3, 1, 1, 1, 1, 1, 4])))
        .put_u32("tokenizer.ggml.eos_token_id", 1)
        .put_text(
            "tokenizer.chat_template",
            "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
        );
    let file = writer.finish();
    let directory = Gguf::parse(&file).expect("the base is a valid file");
    let header = directory.tensors().iter().map(|tensor| tensor.bytes.start).min().unwrap_or(file.len());
    Base { file, header }
});

static POOL: LazyLock<Pool> = LazyLock::new(|| Pool::new(1));

fuzz_target!(|data: &[u8]| {
    if data.starts_with(b"GGUF") {
        return read(data.to_vec());
    }
    let Some((&cut, changes)) = data.split_first() else { return };
    let base = &*BASE;
    let mut file = base.file.clone();
    for change in changes.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
        file[at % base.header] = change[2];
    }
    // Usually not at all.
    if let sixteenths @ 0..16 = usize::from(cut.wrapping_sub(b'a')) {
        file.truncate(base.header * sixteenths / 16);
    }
    read(file);
});

fn read(bytes: Vec<u8>) {
    let Ok(file) = ModelFile::from_bytes(bytes) else { return };
    let Some(gguf) = file.gguf() else { return };
    for tensor in file.tensors() {
        let (values, element) = (tensor.shape.iter().product::<usize>(), tensor.element);
        assert_eq!(file.data(tensor).len(), values / element.block_len() * element.block_bytes());
    }
    if let Ok(model) = text::text_model(gguf) {
        let messages = [serde_json::json!({"role": "user", "content": "abc <|im_end|>"})];
        let _ = model.encode_chat(&ChatPrompt::new(&messages));
        if let Ok(ids) = model.encode_text("ab c\n", Special::ALL) {
            let _ = model.tokenizer().decode(&ids, false);
        }
    }
    let Ok(spec) = ModelSpec::from_gguf(gguf) else { return };
    let _ = (spec.qkv_dim(), spec.kv_bytes_per_token());
    let blocks = spec.blocks_for_memory(16 << 30, 16);
    assert!(spec.memory_for_blocks(blocks, 16) <= 16 << 30);
    if let Ok(weights) = Weights::load(&Arc::new(file), &spec, &Shard::whole(&spec), Isa::detect(), &POOL) {
        let mut row = vec![0.0; spec.dim];
        weights.embeddings.lookup(spec.vocab_size as u32 - 1, &mut row);
    }
}
