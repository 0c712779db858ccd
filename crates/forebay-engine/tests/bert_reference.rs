//! Encoders against Hugging Face transformers: a tiny random BERT (`fixtures/make_tiny_bert.py`), and all-MiniLM-L6-v2
//! (`reference/minilm_embeddings.py`) where it is on this machine.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forebay_engine::exec::{BertEncoder, Encoder};
use forebay_engine::model::{EncoderError, EncoderSpec, Pooling, is_encoder};
use forebay_kernels::{Isa, Pool};
use serde_json::{Value, json};

#[derive(serde::Deserialize)]
struct Tiny {
    ids: Vec<u32>,
    /// Of length 1.
    mean: Vec<f32>,
    cls: Vec<f32>,
}

#[derive(serde::Deserialize)]
struct Real {
    ids: Vec<u32>,
    vector: Vec<f32>,
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-bert")
}

fn tiny() -> Vec<Tiny> {
    serde_json::from_str(include_str!("fixtures/tiny-bert.json")).unwrap()
}

/// A copy of the fixture in which one JSON file is changed; `Null` removes it.
fn changed(file: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in ["", "1_Pooling"] {
        fs::create_dir_all(copy.path().join(name)).unwrap();
        for entry in fs::read_dir(fixture().join(name)).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_file() {
                fs::copy(entry.path(), copy.path().join(name).join(entry.file_name())).unwrap();
            }
        }
    }
    let path = copy.path().join(file);
    let mut value = fs::read(&path).map_or(Value::Null, |text| serde_json::from_slice(&text).unwrap());
    change(&mut value);
    match value {
        Value::Null => fs::remove_file(&path).unwrap(),
        value => fs::write(&path, value.to_string()).unwrap(),
    }
    copy
}

fn encode(directory: &Path, isa: Isa, threads: usize, sequences: &[&[u32]]) -> Vec<Vec<f32>> {
    let mut encoder = BertEncoder::open(directory, isa, Arc::new(Pool::new(threads))).unwrap();
    let dim = encoder.dim();
    let sequences: Vec<Arc<[u32]>> = sequences.iter().map(|&ids| ids.into()).collect();
    encoder.encode(&sequences).chunks_exact(dim).map(<[f32]>::to_vec).collect()
}

fn normalized(vector: &[f32]) -> Vec<f32> {
    let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    vector.iter().map(|x| x / length).collect()
}

fn difference(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn vectors_are_those_of_transformers() {
    let cases = tiny();
    let ids: Vec<&[u32]> = cases.iter().map(|case| case.ids.as_slice()).collect();
    let cls = changed("1_Pooling/config.json", |config| {
        *config = json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false});
    });
    for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
        for (ours, case) in encode(&fixture(), isa, 2, &ids).iter().zip(&cases) {
            let error = difference(&normalized(ours), &case.mean);
            assert!(error < 1e-5, "{isa}: {error} from the reference");
        }
        for (ours, case) in encode(cls.path(), isa, 1, &ids).iter().zip(&cases) {
            let error = difference(ours, &case.cls);
            assert!(error < 1e-4, "{isa}: {error} from the reference");
        }
    }
}

#[test]
fn a_text_has_the_same_bits_alone_and_in_a_batch() {
    let cases = tiny();
    let ids: Vec<&[u32]> = cases.iter().map(|case| case.ids.as_slice()).collect();
    let together = encode(&fixture(), Isa::detect(), 2, &ids);
    for (ids, together) in ids.iter().zip(&together) {
        assert_eq!(&encode(&fixture(), Isa::detect(), 1, &[ids])[0], together);
    }
    assert!(encode(&fixture(), Isa::detect(), 1, &[]).is_empty());
}

#[test]
fn the_files_say_what_it_is() {
    let spec = EncoderSpec::read(&fixture()).unwrap();
    assert_eq!((spec.vocab_size, spec.dim, spec.layers, spec.heads, spec.ffn_dim), (97, 36, 2, 3, 50));
    assert_eq!((spec.tokens_max, spec.positions), (48, 64));
    assert_eq!((spec.pooling, spec.normalize, &spec.matryoshka), (Pooling::Mean, true, &None));
    assert!(is_encoder(&fixture()));
    assert!(!is_encoder(Path::new("/no/such/directory")));

    let read = |file: &str, change: fn(&mut Value)| EncoderSpec::read(changed(file, change).path()).unwrap();
    let plain = read("modules.json", |modules| *modules = Value::Null);
    assert_eq!((plain.pooling, plain.normalize), (Pooling::Cls, true));
    let raw = read("modules.json", |modules| drop(modules.as_array_mut().unwrap().pop()));
    assert_eq!((raw.pooling, raw.normalize), (Pooling::Mean, false));
    let long = read("sentence_bert_config.json", |config| *config = Value::Null);
    assert_eq!(long.tokens_max, 64);
    let longer = read("sentence_bert_config.json", |config| config["max_seq_length"] = json!(4096));
    assert_eq!(longer.tokens_max, 64);
    let short = read("config.json", |config| config["matryoshka_dimensions"] = json!([8, 16]));
    assert_eq!(short.matryoshka, Some(vec![8, 16]));
    let any = read("config.json", |config| config["is_matryoshka"] = json!(true));
    assert_eq!(any.matryoshka, Some(vec![]));
}

#[test]
fn what_cannot_be_run_is_refused() {
    let check = |file: &str, change: fn(&mut Value), expect: &str| {
        let copy = changed(file, change);
        let pool = Arc::new(Pool::new(1));
        let error: EncoderError =
            BertEncoder::open(copy.path(), Isa::detect(), pool).map(|_| ()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(expect), "{text}");
    };
    let config = |change, expect| check("config.json", change, expect);
    config(
        |c| c["architectures"] = json!(["XLMRobertaModel"]),
        "the architecture `XLMRobertaModel` is not supported for embeddings; supported are BertModel",
    );
    config(|c| c["hidden_act"] = json!("relu"), "`hidden_act` of config.json is `relu`; `gelu` expected");
    config(|c| c["position_embedding_type"] = json!("relative_key"), "`absolute` expected");
    config(|c| c["num_attention_heads"] = json!(5), "5; a divisor of `hidden_size` (36) expected");
    config(|c| c["num_attention_heads"] = json!(0), "`num_attention_heads` of config.json is 0; 1 to");
    config(|c| c["hidden_size"] = json!(1u64 << 60), "`hidden_size` of config.json is");
    config(|c| c["hidden_size"] = json!("x"), "config.json is not what it should be");
    config(|c| c["is_decoder"] = json!(true), "false expected");
    config(|c| *c = Value::Null, "can't read");
    config(|c| c["hidden_size"] = json!(72), "has the shape [97, 36]; [97, 72] expected");
    config(|c| c["num_hidden_layers"] = json!(3), "no tensor `encoder.layer.2.attention.self.query.weight`");
    config(|c| c["num_hidden_layers"] = json!(1), "tensor `encoder.layer.1.");
    check(
        "modules.json",
        |m| m[2]["type"] = json!("sentence_transformers.models.Dense"),
        "a module of the type `sentence_transformers.models.Dense`",
    );
    check(
        "modules.json",
        |m| m[1]["path"] = json!("../1_Pooling"),
        "`../1_Pooling`; the name of a directory",
    );
    let pooling = |change, expect| check("1_Pooling/config.json", change, expect);
    pooling(
        |p| p["pooling_mode_max_tokens"] = json!(true),
        "is not supported: mean and max; mean and cls are",
    );
    pooling(|p| *p = json!({}), "is not supported: ");
    pooling(|p| *p = Value::Null, "can't read");
    check("sentence_bert_config.json", |c| c["max_seq_length"] = json!(0), "`max_seq_length`");
}

#[test]
fn broken_weights_are_an_error() {
    for len in [0, 7, 1000, 100_000] {
        let copy = changed("modules.json", |_| ());
        let path = copy.path().join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..len.min(bytes.len() - 1)]).unwrap();
        let opened = BertEncoder::open(copy.path(), Isa::detect(), Arc::new(Pool::new(1)));
        assert!(matches!(opened.map(|_| ()), Err(EncoderError::Weights(_))), "{len} bytes");
    }
}

/// Skipped unless `FOREBAY_TEST_MINILM` is the directory of all-MiniLM-L6-v2.
#[test]
fn minilm() {
    let Some(path) = std::env::var_os("FOREBAY_TEST_MINILM") else { return };
    let cases: Vec<Real> = serde_json::from_str(include_str!("fixtures/minilm-l6-v2.json")).unwrap();
    let ids: Vec<&[u32]> = cases.iter().map(|case| case.ids.as_slice()).collect();
    for (ours, case) in encode(Path::new(&path), Isa::detect(), 2, &ids).iter().zip(&cases) {
        let ours = normalized(ours);
        let cosine: f32 = ours.iter().zip(&case.vector).map(|(a, b)| a * b).sum();
        assert!(cosine > 0.9999, "{cosine}");
        let error = difference(&ours, &case.vector);
        assert!(error < 1e-5, "{error} from the reference");
    }
}
