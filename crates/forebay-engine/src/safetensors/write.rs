//! Writes safetensors files. For tests: everything is held in memory.

use serde_json::{Map, Value, json};

use super::Dtype;

/// A tensor to write: name, type, shape (outermost dimension first), bytes.
pub type Pending<'a> = (&'a str, Dtype, &'a [usize], &'a [u8]);

/// The bytes of a file with these tensors, in this order.
pub fn file(tensors: &[Pending<'_>]) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut end = 0;
    for &(name, dtype, shape, bytes) in tensors {
        let start = end;
        end += bytes.len();
        let entry = json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [start, end]});
        header.insert(name.to_owned(), entry);
    }
    let data: Vec<&[u8]> = tensors.iter().map(|tensor| tensor.3).collect();
    with_header(&Value::Object(header).to_string(), &data.concat())
}

/// A file with this header, whatever it says.
pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let mut header = header.to_owned();
    // The data stands at a multiple of eight bytes, as the format's own writer has it.
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}
