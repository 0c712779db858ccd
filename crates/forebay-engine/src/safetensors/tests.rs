use std::error::Error;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use tempfile::TempDir;

use super::write::{file, with_header};
use super::*;

fn sample() -> Vec<u8> {
    file(&[
        ("a.weight", Dtype::F32, &[2, 3], &[7; 24]),
        ("b", Dtype::BF16, &[3], &[1, 2, 3, 4, 5, 6]),
        ("scalar", Dtype::F32, &[], &[0; 4]),
        ("none", Dtype::F16, &[0, 4], &[]),
    ])
}

#[test]
fn reads_back_what_was_written() {
    let bytes = sample();
    let header = Safetensors::parse(&bytes).unwrap();
    let names: Vec<&str> = header.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["a.weight", "b", "scalar", "none"]);
    let b = header.tensor("b").unwrap();
    assert_eq!(
        (b.dtype, &b.shape[..], &bytes[b.bytes.clone()]),
        (Dtype::BF16, &[3][..], &[1, 2, 3, 4, 5, 6][..])
    );
    assert!(header.tensor("scalar").unwrap().shape.is_empty());
    assert!(header.tensor("c").is_none());
}

/// An error and its sources, as they are logged.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

fn check(file: &[u8], expect: &str) {
    assert_eq!(chain(&Safetensors::parse(file).unwrap_err()), expect);
}

/// A file with eight bytes of data and the header `header`.
fn check_header(header: &str, expect: &str) {
    check(&with_header(header, &[0; 8]), expect);
}

#[test]
fn each_fault_is_named() {
    check(b"GGUF", "the file has 4 bytes; a safetensors file begins with 8 bytes of length and a header");
    check(
        b"GGUF\x03\0\0\0....",
        "the header is 14064895815 bytes long, the limit is 100000000; this is no safetensors file",
    );
    check(
        &[100, 0, 0, 0, 0, 0, 0, 0, b'{'],
        "the file ends in the middle of the header: 100 bytes are needed, 1 are left",
    );
    check_header(
        "[1, 2]",
        "the header is not JSON as the format has it: invalid type: sequence, expected a map of tensors at line 1 \
         column 0",
    );
    check_header(
        r#"{"t": {"dtype": "F32", "shape": [2]}}"#,
        "the header's entry of tensor `t` is not as the format has it: missing field `data_offsets` at line 1 column \
         30",
    );
    check_header(
        r#"{"t": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}"#,
        "the header's entry of tensor `t` is not as the format has it: invalid value: integer `-2`, expected u64 at \
         line 1 column 29",
    );
    check_header(
        r#"{"t": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}"#,
        "tensor `t` has the unknown element type `Q4`",
    );
    check_header(
        r#"{"t": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 8]}}"#,
        "tensor `t` has the shape [4294967296, 4294967296], whose size overflows",
    );
    check_header(
        r#"{"t": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}"#,
        "tensor `t` has its data from 8 to 16; the file has 8 bytes of tensor data",
    );
    check_header(
        r#"{"t": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}"#,
        "tensor `t` has its data from 8 to 0; the file has 8 bytes of tensor data",
    );
    check_header(
        r#"{"t": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}"#,
        "tensor `t` is F32 [3], which is 12 bytes, but has 8 bytes of data",
    );
    let two = |first: &str, second: &str| {
        format!(
            r#"{{"t": {{"dtype": "U8", "shape": [4], "data_offsets": {first}}}, "u": {{"dtype": "U8", "shape": [4],
            "data_offsets": {second}}}}}"#
        )
    };
    check_header(&two("[0, 4]", "[2, 6]"), "tensor `u` has its data from 2; the tensor before it ends at 4");
    check_header(&two("[4, 8]", "[4, 8]"), "tensor `t` has its data from 4; the tensor before it ends at 0");
    check_header(&two("[0, 4]", "[0, 4]"), "tensor `u` has its data from 0; the tensor before it ends at 4");
    check_header(
        r#"{"t": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "t": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}"#,
        "tensor `t` stands in the file twice",
    );
    check_header(
        r#"{"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#,
        "4 bytes at the file's end belong to no tensor",
    );
}

#[test]
fn every_prefix_of_a_good_file_is_refused() {
    let file = sample();
    for len in 0..file.len() {
        assert!(Safetensors::parse(&file[..len]).is_err(), "{len} of {} bytes", file.len());
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Safetensors::parse(&bytes);
        let _ = Safetensors::parse(&with_header(&String::from_utf8_lossy(&bytes), &bytes));
    }

    /// Whatever parses has its tensors within the file, of the size that their shape says.
    #[test]
    fn mutated_files_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut file = sample();
        for (at, byte) in edits {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if let Ok(header) = Safetensors::parse(&file) {
            for tensor in header.tensors() {
                let values: usize = tensor.shape.iter().product();
                let data = file.get(tensor.bytes.clone()).map(<[u8]>::len);
                prop_assert_eq!(data, Some(values * tensor.dtype.bytes()));
            }
        }
    }
}

/// A directory with these files.
fn directory(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn shard(name: &str, byte: u8) -> Vec<u8> {
    file(&[(name, Dtype::F32, &[1], &[byte; 4])])
}

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

#[test]
fn shards_are_one_directory() {
    let index = r#"{"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors"}}"#;
    let files = [shard("a", 1), shard("b", 2)];
    let dir = directory(&[(INDEX_FILE, index.as_bytes()), (SHARDS[0], &files[0]), (SHARDS[1], &files[1])]);
    let all = Directory::open(dir.path()).unwrap();
    assert_eq!(all.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(all.tensor("b").unwrap().data, [2; 4]);
    assert_eq!(all.bytes(), (files[0].len() + files[1].len()) as u64);

    // A whole file goes first, as in transformers.
    fs::write(dir.path().join(WEIGHTS_FILE), shard("c", 3)).unwrap();
    assert_eq!(Directory::open(dir.path()).unwrap().names().collect::<Vec<_>>(), ["c"]);
}

/// `DIR` in `expect` stands for the directory.
fn check_directory(files: &[(&str, &[u8])], expect: &str) {
    let dir = directory(files);
    let error = chain(&Directory::open(dir.path()).unwrap_err());
    assert_eq!(error.replace(&dir.path().display().to_string(), "DIR"), expect);
}

#[test]
fn a_broken_directory_is_an_error_that_names_the_file() {
    let (a, b) = (shard("a", 1), shard("b", 2));
    let index = |map: &str| format!(r#"{{"weight_map": {map}}}"#);
    check_directory(&[], "DIR has no `model.safetensors` and no `model.safetensors.index.json`");
    check_directory(
        &[(WEIGHTS_FILE, &a[..a.len() - 1])],
        "DIR/model.safetensors is no safetensors file that can be used: tensor `a` has its data from 0 to 4; the file \
         has 3 bytes of tensor data",
    );
    check_directory(
        &[(INDEX_FILE, b"{}")],
        "DIR/model.safetensors.index.json is not an index of shards: missing field `weight_map` at line 1 column 2",
    );
    for name in ["../b.safetensors", "/etc/passwd", "", "x/y"] {
        check_directory(
            &[(INDEX_FILE, index(&format!(r#"{{"a": "{name}"}}"#)).as_bytes())],
            &format!(
                "DIR/model.safetensors.index.json has tensor `a` in `{name}`, which is not the name of a file beside it"
            ),
        );
    }
    check_directory(
        &[(INDEX_FILE, index(r#"{"a": "gone"}"#).as_bytes())],
        "cannot map the model's weights: cannot open `DIR/gone`: No such file or directory (os error 2)",
    );
    check_directory(
        &[(INDEX_FILE, index(r#"{"a": "x", "b": "x"}"#).as_bytes()), ("x", &a)],
        "tensor `b` is not in `x`, where `model.safetensors.index.json` has it",
    );
    check_directory(
        &[(INDEX_FILE, index(r#"{"a": "x", "b": "y"}"#).as_bytes()), ("x", &a), ("y", &a)],
        "tensor `a` stands in `x` and in `y`",
    );
    check_directory(
        &[(INDEX_FILE, index(r#"{"a": "x", "b": "y"}"#).as_bytes()), ("x", &a), ("y", &b[..7])],
        "DIR/y is no safetensors file that can be used: the file has 7 bytes; a safetensors file begins with 8 bytes \
         of length and a header",
    );
}

#[test]
fn too_many_shards_are_refused() {
    let map: Vec<String> = (0..1025).map(|n| format!(r#""t{n}": "s{n}""#)).collect();
    let index = format!(r#"{{"weight_map": {{{}}}}}"#, map.join(","));
    check_directory(
        &[(INDEX_FILE, index.as_bytes())],
        "DIR/model.safetensors.index.json names 1025 shards, the limit is 1024",
    );
}

#[test]
fn one_file_in_memory_is_a_directory_too() {
    let all = Directory::from_bytes(sample()).unwrap();
    let view = all.tensor("a.weight").unwrap();
    assert_eq!((view.dtype, view.shape, view.data.len()), (Dtype::F32, &[2, 3][..], 24));
    assert!(Directory::open(Path::new("/nowhere")).is_err());
}
