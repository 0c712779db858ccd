//! A safetensors file: any bytes give tensors that lie within the file, or an error.
//!
//! An input that starts with `{` is the header of a file with a little data; any other is a whole file.
#![no_main]

use forebay_engine::safetensors::write::with_header;
use forebay_engine::safetensors::{Directory, Safetensors};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let bytes = match std::str::from_utf8(data) {
        Ok(header) if header.starts_with('{') => with_header(header, &[1; 64]),
        _ => data.to_vec(),
    };
    let Ok(header) = Safetensors::parse(&bytes) else { return };
    let mut end = None;
    for tensor in header.tensors() {
        assert_eq!(tensor.bytes.len(), tensor.shape.iter().product::<usize>() * tensor.dtype.bytes());
        assert_eq!(tensor.bytes.start, end.unwrap_or(tensor.bytes.start));
        end = Some(tensor.bytes.end);
    }
    assert_eq!(end.unwrap_or(bytes.len()), bytes.len());
    let directory = Directory::from_bytes(bytes).expect("it was read before");
    assert_eq!(directory.names().count(), header.tensors().len());
    for tensor in header.tensors() {
        let view = directory.tensor(&tensor.name).expect("it is in the header");
        assert_eq!(view.data.len(), tensor.bytes.len());
    }
});
