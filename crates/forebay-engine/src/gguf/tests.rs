use proptest::prelude::*;

use super::read::{Place, parse};
use super::write::Writer;
use super::*;
use crate::model::tiny::TinyLlama;

/// One entry of every kind and two tensors.
fn sample() -> Writer {
    let mut file = Writer::new();
    file.put("u", &Value::Uint(7))
        .put("u64", &Value::Uint(1 << 40))
        .put("i", &Value::Int(-7))
        .put("i64", &Value::Int(-(1 << 40)))
        .put_f32("f", 0.5)
        .put("f64", &Value::Float(0.1))
        .put("b", &Value::Bool(true))
        .put_text("t", "Grüße")
        .put("uints", &Value::List(List::Uints(vec![1, 2])))
        .put("ints", &Value::List(List::Ints(vec![-1])))
        .put("floats", &Value::List(List::Floats(vec![0.25])))
        .put("bools", &Value::List(List::Bools(vec![true, false])))
        .put("texts", &Value::List(List::Texts(vec![String::new(), "a".into()])))
        .put("nested", &Value::List(List::Lists(vec![List::Uints(vec![3]), List::Texts(vec!["x".into()])])))
        .tensor_f32("vector", &[3], &[1.0, 2.0, 3.0])
        .tensor("matrix", &[64, 2], ElementType::Q4_1, (0..80).collect());
    file
}

#[test]
fn reads_back_what_was_written() {
    let bytes = sample().finish();
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!(gguf.version, 3);
    assert_eq!(gguf.alignment, 32);
    assert_eq!(gguf.metadata().count(), 14);
    assert_eq!(gguf.get("u"), Some(&Value::Uint(7)));
    assert_eq!(gguf.get("u64").and_then(Value::as_u64), Some(1 << 40));
    assert_eq!(gguf.get("i"), Some(&Value::Int(-7)));
    assert_eq!(gguf.get("i64"), Some(&Value::Int(-(1 << 40))));
    assert_eq!(gguf.get("f").and_then(Value::as_f64), Some(0.5));
    assert_eq!(gguf.get("f64").and_then(Value::as_f64), Some(0.1));
    assert_eq!(gguf.get("b").and_then(Value::as_bool), Some(true));
    assert_eq!(gguf.get("t").and_then(Value::as_str), Some("Grüße"));
    assert_eq!(gguf.get("texts").and_then(Value::as_texts).unwrap(), ["", "a"]);
    let Some(Value::List(List::Lists(nested))) = gguf.get("nested") else { panic!("a list of lists") };
    assert_eq!(nested[0], List::Uints(vec![3]));

    let vector = gguf.tensor("vector").unwrap();
    assert_eq!(bytes[vector.bytes.clone()], [0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64]);
    let matrix = gguf.tensor("matrix").unwrap();
    assert_eq!((matrix.cols(), matrix.rows(), matrix.element.name()), (64, 2, "Q4_1"));
    assert_eq!(bytes[matrix.bytes.clone()], (0..80).collect::<Vec<u8>>());
    assert!(gguf.tensor("other").is_none());
}

/// A header that announces `tensors` and `entries`, and then `rest`.
fn header(version: u32, tensors: u64, entries: u64, rest: &[u8]) -> Vec<u8> {
    let mut file = b"GGUF".to_vec();
    file.extend(version.to_le_bytes());
    file.extend(tensors.to_le_bytes());
    file.extend(entries.to_le_bytes());
    file.extend(rest);
    file
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// One metadata entry called `k`, of value type `kind`.
fn entry(kind: u32, payload: &[u8]) -> Vec<u8> {
    header(3, 0, 1, &[&string(b"k"), &kind.to_le_bytes()[..], payload].concat())
}

fn tensor(dims: &[u64], element: u32, offset: u64, data: usize) -> Vec<u8> {
    let mut entry = string(b"t");
    entry.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|dim| entry.extend(dim.to_le_bytes()));
    entry.extend(element.to_le_bytes());
    entry.extend(offset.to_le_bytes());
    let mut file = header(3, 1, 0, &entry);
    file.resize(file.len().next_multiple_of(32) + data, 0);
    file
}

fn check(file: &[u8], expect: &str) {
    assert_eq!(Gguf::parse(file).unwrap_err().to_string(), expect);
}

#[test]
fn each_fault_is_named() {
    check(b"", "not a GGUF file: it starts with [], not with `GGUF`");
    check(b"PK\x03\x04....", "not a GGUF file: it starts with [50, 4b, 03, 04], not with `GGUF`");
    check(&header(1, 0, 0, &[]), "GGUF version 1 is not supported; supported: 2 and 3, little endian");
    check(
        &header(3 << 24, 0, 0, &[]),
        "GGUF version 50331648 is not supported; supported: 2 and 3, little endian",
    );
    check(
        &header(3, 0, 0, &[])[..20],
        "the file ends in the middle of the header: 8 bytes are needed, 4 are left",
    );
    check(&header(3, 0, u64::MAX, &[]), "the header is 18446744073709551615, the limit is 16384");
    check(&header(3, 0, 1, &string(&[0xff])), "metadata key 0 is not valid UTF-8");
    check(&entry(99, &[]), "the value of `k` has the unknown value type 99");
    check(&entry(7, &[2]), "the value of `k` is a boolean with the value 2; 0 or 1 expected");
    check(
        &entry(8, &100u64.to_le_bytes()),
        "the file ends in the middle of the value of `k`: 100 bytes are needed, 0 are left",
    );
    check(
        &entry(8, &u64::MAX.to_le_bytes()),
        "the value of `k` is 18446744073709551615, the limit is 4194304",
    );
    // An array of two million u64 in a file of a few bytes.
    let array = [&10u32.to_le_bytes()[..], &2_000_000u64.to_le_bytes()].concat();
    check(
        &entry(9, &array),
        "the file ends in the middle of the value of `k`: 16000000 bytes are needed, 0 are left",
    );
    // Arrays in arrays in arrays...
    let nest = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(9);
    check(&entry(9, &nest), "the value of `k` is 5, the limit is 4");
    let twice = [string(b"k"), vec![0, 0, 0, 0, 1]].concat().repeat(2);
    check(&header(3, 0, 2, &twice), "the value of `k` stands in the file twice");
    let alignment = [&string(b"general.alignment")[..], &[4, 0, 0, 0], &[3, 0, 0, 0]].concat();
    check(&header(3, 0, 1, &alignment), "`general.alignment` must be a power of two from 8 to 1048576");

    check(&tensor(&[4], 4, 0, 16), "tensor `t` has the unknown element type 4");
    check(&tensor(&[], 0, 0, 0), "tensor `t` has the shape [], which is not usable: it has no dimensions");
    check(
        &tensor(&[4, 0], 0, 0, 0),
        "tensor `t` has the shape [4, 0], which is not usable: a dimension is zero",
    );
    check(
        &tensor(&[33], 8, 0, 0),
        "tensor `t` has the shape [33], which is not usable: rows are not whole blocks",
    );
    check(
        &tensor(&[1 << 32, 1 << 32], 0, 0, 0),
        "tensor `t` has the shape [4294967296, 4294967296], which is not usable: its size overflows",
    );
    check(&tensor(&[1; 5], 0, 0, 0), "the directory entry of tensor `t` is 5, the limit is 4");
    check(&tensor(&[4], 0, 8, 64), "tensor `t` has its data at offset 8, which is not a multiple of 32");
    check(
        &tensor(&[4, 4], 0, 32, 64),
        "tensor `t` needs 64 bytes at offset 32, the file has 64 bytes of tensor data",
    );
    check(
        &tensor(&[4], 0, u64::MAX - 31, 64),
        "tensor `t` needs 16 bytes at offset 18446744073709551584, the file has 64 bytes of tensor data",
    );
}

#[test]
fn array_items_are_limited_over_the_whole_file() {
    let limits = Limits { array_items: 4, ..LIMITS };
    let mut file = Writer::new();
    file.put("a", &Value::List(List::Uints(vec![0; 3])));
    assert!(parse(&file.finish(), &limits).is_ok());
    file.put("b", &Value::List(List::Uints(vec![0; 3])));
    assert_eq!(
        parse(&file.finish(), &limits).unwrap_err(),
        GgufError::Limit { what: Place::Value("b".into()), value: 3, limit: 1 }
    );
}

#[test]
fn every_prefix_of_a_good_file_is_refused() {
    let file = sample().finish();
    for len in 0..file.len() {
        assert!(Gguf::parse(&file[..len]).is_err(), "{len} of {} bytes", file.len());
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Gguf::parse(&bytes);
        let _ = Gguf::parse(&header(3, 2, 2, &bytes));
    }

    /// Whatever parses has its tensors within the file.
    #[test]
    fn mutated_files_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut file = sample().finish();
        for (at, byte) in edits {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if let Ok(gguf) = Gguf::parse(&file) {
            for tensor in gguf.tensors() {
                prop_assert!(file.get(tensor.bytes.clone()).is_some());
                prop_assert!(tensor.rows() * tensor.cols() > 0);
            }
        }
    }

    #[test]
    fn text_survives(key in "[a-z.]{1,20}", value in ".{0,40}") {
        let mut file = Writer::new();
        file.put_text(&key, &value);
        let gguf = Gguf::parse(&file.finish()).unwrap();
        prop_assert_eq!(gguf.get(&key).and_then(Value::as_str), Some(value.as_str()));
    }
}

#[test]
fn a_tiny_model_file_has_its_tensors_aligned() {
    let bytes = TinyLlama::default().to_gguf();
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!(gguf.tensors().len(), 2 + 9 * 2);
    assert!(gguf.tensors().iter().all(|t| t.bytes.start % 32 == 0));
}
