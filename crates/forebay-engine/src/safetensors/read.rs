//! The header of one file: eight bytes of length, JSON, then the tensors' bytes without gaps.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{Dtype, Safetensors, TensorInfo};

/// The format's own limit on the JSON of a header.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Why a file is not a safetensors file that we can read.
#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    #[error("the file has {bytes} bytes; a safetensors file begins with 8 bytes of length and a header")]
    TooShort { bytes: usize },
    #[error("the header is {bytes} bytes long, the limit is {HEADER_BYTES_MAX}; this is no safetensors file")]
    HeaderTooLong { bytes: u64 },
    #[error("the file ends in the middle of the header: {needed} bytes are needed, {left} are left")]
    Truncated { needed: u64, left: u64 },
    #[error("the header is not JSON as the format has it")]
    Json(#[source] serde_json::Error),
    #[error("the header's entry of tensor `{tensor}` is not as the format has it")]
    Entry { tensor: String, source: serde_json::Error },
    #[error("tensor `{tensor}` stands in the file twice")]
    Twice { tensor: String },
    #[error("tensor `{tensor}` has the unknown element type `{dtype}`")]
    Dtype { tensor: String, dtype: String },
    #[error("tensor `{tensor}` has the shape {shape:?}, whose size overflows")]
    Shape { tensor: String, shape: Vec<u64> },
    #[error("tensor `{tensor}` has its data from {start} to {end}; the file has {data} bytes of tensor data")]
    OutOfFile { tensor: String, start: u64, end: u64, data: u64 },
    #[error(
        "tensor `{tensor}` is {dtype} {shape:?}, which is {expected} bytes, but has {found} bytes of data"
    )]
    Size { tensor: String, dtype: Dtype, shape: Vec<usize>, expected: usize, found: usize },
    /// Bytes of two tensors, or of none: the format forbids both.
    #[error("tensor `{tensor}` has its data from {start}; the tensor before it ends at {expected}")]
    Misplaced { tensor: String, start: usize, expected: usize },
    #[error("{bytes} bytes at the file's end belong to no tensor")]
    Rest { bytes: usize },
}

/// As in the header: offsets count from its end.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's entries in its own order, so that a name that stands there twice is seen.
struct Entries<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Entries<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Entries<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

pub(super) fn parse(file: &[u8]) -> Result<Safetensors, SafetensorsError> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(SafetensorsError::TooShort { bytes: file.len() });
    };
    let bytes = u64::from_le_bytes(*length);
    if bytes > HEADER_BYTES_MAX {
        return Err(SafetensorsError::HeaderTooLong { bytes });
    }
    let Some((header, data)) = rest.split_at_checked(bytes as usize) else {
        return Err(SafetensorsError::Truncated { needed: bytes, left: rest.len() as u64 });
    };
    let data_start = file.len() - data.len();
    let Entries(entries) = serde_json::from_slice(header).map_err(SafetensorsError::Json)?;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        tensors.push(tensor(name, entry.get(), data.len())?);
    }
    // Offsets are from the header's end until here.
    tensors.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    let mut end = 0;
    let mut by_name = HashMap::with_capacity(tensors.len());
    for (nth, tensor) in tensors.iter_mut().enumerate() {
        let Range { start, end: this_end } = tensor.bytes;
        if by_name.insert(tensor.name.clone(), nth).is_some() {
            return Err(SafetensorsError::Twice { tensor: tensor.name.clone() });
        }
        if start != end {
            return Err(SafetensorsError::Misplaced { tensor: tensor.name.clone(), start, expected: end });
        }
        end = this_end;
        tensor.bytes = data_start + start..data_start + this_end;
    }
    if end != data.len() {
        return Err(SafetensorsError::Rest { bytes: data.len() - end });
    }
    Ok(Safetensors { tensors, by_name })
}

fn tensor(name: String, entry: &str, data: usize) -> Result<TensorInfo, SafetensorsError> {
    let Entry { dtype, shape, data_offsets: (start, end) } = match serde_json::from_str(entry) {
        Ok(entry) => entry,
        Err(source) => return Err(SafetensorsError::Entry { tensor: name, source }),
    };
    let Some(dtype) = Dtype::from_name(&dtype) else {
        return Err(SafetensorsError::Dtype { tensor: name, dtype });
    };
    let sizes: Option<Vec<usize>> = shape.iter().map(|&n| usize::try_from(n).ok()).collect();
    let product = |sizes: &Vec<usize>| sizes.iter().try_fold(dtype.bytes(), |all, &n| all.checked_mul(n));
    let Some((expected, sizes)) = sizes.and_then(|sizes| Some((product(&sizes)?, sizes))) else {
        return Err(SafetensorsError::Shape { tensor: name, shape });
    };
    if start > end || end > data as u64 {
        return Err(SafetensorsError::OutOfFile { tensor: name, start, end, data: data as u64 });
    }
    let bytes = start as usize..end as usize;
    if bytes.len() != expected {
        let found = bytes.len();
        return Err(SafetensorsError::Size { tensor: name, dtype, shape: sizes, expected, found });
    }
    Ok(TensorInfo { name, dtype, shape: sizes, bytes })
}
