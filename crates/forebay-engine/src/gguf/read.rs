//! The GGUF parser: a cursor over the file's bytes, with a limit on everything.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::{ElementType, Gguf, List, TensorInfo, Value};

/// Bounds on what a file may ask for. Generous for real models (a 262k vocabulary has three arrays of that length).
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub metadata_entries: u64,
    pub tensors: u64,
    /// Bytes of one string value (a chat template, a token).
    pub string_bytes: u64,
    /// Bytes of a key or tensor name.
    pub name_bytes: u64,
    /// Array elements in the whole file, nested ones included.
    pub array_items: u64,
    /// Arrays within arrays.
    pub array_depth: u32,
    pub tensor_dims: u32,
    pub alignment: u64,
}

/// The limits of [`Gguf::parse`]. `array_items` bounds memory: 8 Mi items of at most 24 bytes plus their text.
pub const LIMITS: Limits = Limits {
    metadata_entries: 16_384,
    tensors: 65_536,
    string_bytes: 4 << 20,
    name_bytes: 1024,
    array_items: 8 << 20,
    array_depth: 4,
    tensor_dims: 4,
    alignment: 1 << 20,
};

/// Why a file is not a GGUF file that we can read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum GgufError {
    #[error("not a GGUF file: it starts with {start:02x?}, not with `GGUF`")]
    Magic { start: Vec<u8> },
    #[error("GGUF version {version} is not supported; supported: 2 and 3, little endian")]
    Version { version: u32 },
    #[error("the file ends in the middle of {what}: {needed} bytes are needed, {left} are left")]
    Truncated { what: Place, needed: u64, left: u64 },
    #[error("{what} is {value}, the limit is {limit}")]
    Limit { what: Place, value: u64, limit: u64 },
    #[error("{what} is not valid UTF-8")]
    Utf8 { what: Place },
    #[error("{what} has the unknown value type {number}")]
    ValueType { what: Place, number: u32 },
    #[error("{what} is a boolean with the value {value}; 0 or 1 expected")]
    Bool { what: Place, value: u8 },
    #[error("{what} stands in the file twice")]
    Duplicate { what: Place },
    #[error("`general.alignment` must be a power of two from 8 to {limit}", limit = LIMITS.alignment)]
    Alignment,
    #[error("tensor `{tensor}` has the unknown element type {number}")]
    ElementType { tensor: String, number: u32 },
    #[error("tensor `{tensor}` has the shape {shape:?}, which is not usable: {why}")]
    Shape { tensor: String, shape: Vec<u64>, why: &'static str },
    #[error("tensor `{tensor}` has its data at offset {offset}, which is not a multiple of {alignment}")]
    Misaligned { tensor: String, offset: u64, alignment: u64 },
    #[error(
        "tensor `{tensor}` needs {bytes} bytes at offset {offset}, the file has {data} bytes of tensor data"
    )]
    OutOfFile { tensor: String, offset: u64, bytes: u64, data: u64 },
}

/// Which part of the file an error is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Header,
    Key(u64),
    Value(String),
    TensorName(u64),
    Tensor(String),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Header => f.write_str("the header"),
            Self::Key(nth) => write!(f, "metadata key {nth}"),
            Self::Value(key) => write!(f, "the value of `{key}`"),
            Self::TensorName(nth) => write!(f, "the name of tensor {nth}"),
            Self::Tensor(name) => write!(f, "the directory entry of tensor `{name}`"),
        }
    }
}

pub(super) fn parse(file: &[u8], limits: &Limits) -> Result<Gguf, GgufError> {
    let start = &file[..file.len().min(4)];
    if start != b"GGUF" {
        return Err(GgufError::Magic { start: start.to_vec() });
    }
    let mut cursor = Cursor { file, at: 4, items_left: limits.array_items, limits };
    let version = cursor.u32(&Place::Header)?;
    if !(2..=3).contains(&version) {
        return Err(GgufError::Version { version });
    }
    let tensor_count = cursor.count(&Place::Header, limits.tensors)?;
    let entry_count = cursor.count(&Place::Header, limits.metadata_entries)?;

    let mut metadata = HashMap::new();
    for nth in 0..entry_count {
        let key = cursor.string(&Place::Key(nth), limits.name_bytes)?;
        let place = Place::Value(key);
        let number = cursor.u32(&place)?;
        let value = cursor.value(&place, number, limits.array_depth)?;
        let Place::Value(key) = place else { unreachable!("made three lines above") };
        match metadata.entry(key) {
            Entry::Occupied(there) => {
                return Err(GgufError::Duplicate { what: Place::Value(there.key().clone()) });
            }
            Entry::Vacant(free) => free.insert(value),
        };
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(value) => value
            .as_u64()
            .filter(|a| a.is_power_of_two() && (8..=limits.alignment).contains(a))
            .ok_or(GgufError::Alignment)?,
    };

    let mut entries = Vec::new();
    for nth in 0..tensor_count {
        let name = cursor.string(&Place::TensorName(nth), limits.name_bytes)?;
        entries.push(cursor.tensor(name)?);
    }
    // Tensor data starts at the next aligned position; a file without tensors may end before it.
    let data_start = (cursor.at as u64).next_multiple_of(alignment).min(file.len() as u64);
    let data_len = file.len() as u64 - data_start;
    let mut tensors = Vec::with_capacity(entries.len());
    let mut by_name = HashMap::with_capacity(entries.len());
    for entry in entries {
        let tensor = entry.place(alignment, data_start, data_len)?;
        if by_name.insert(tensor.name.clone(), tensors.len()).is_some() {
            return Err(GgufError::Duplicate { what: Place::Tensor(tensor.name) });
        }
        tensors.push(tensor);
    }
    Ok(Gguf { version, alignment: alignment as usize, metadata, tensors, by_name })
}

/// A tensor directory entry before its place in the file is known to be good.
struct DirectoryEntry {
    name: String,
    shape: Vec<u64>,
    element: ElementType,
    offset: u64,
}

impl DirectoryEntry {
    fn place(self, alignment: u64, data_start: u64, data: u64) -> Result<TensorInfo, GgufError> {
        let Self { name, shape, element, offset } = self;
        let bad = |why| GgufError::Shape { tensor: name.clone(), shape: shape.clone(), why };
        if shape.is_empty() {
            return Err(bad("it has no dimensions"));
        }
        if shape.contains(&0) {
            return Err(bad("a dimension is zero"));
        }
        if !shape[0].is_multiple_of(element.block_len() as u64) {
            return Err(bad("rows are not whole blocks"));
        }
        let bytes = shape
            .iter()
            .try_fold(1u64, |all, &dim| all.checked_mul(dim))
            .and_then(|values| {
                (values / element.block_len() as u64).checked_mul(element.block_bytes() as u64)
            })
            .ok_or_else(|| bad("its size overflows"))?;
        if !offset.is_multiple_of(alignment) {
            return Err(GgufError::Misaligned { tensor: name, offset, alignment });
        }
        if offset.checked_add(bytes).is_none_or(|end| end > data) {
            return Err(GgufError::OutOfFile { tensor: name, offset, bytes, data });
        }
        // Fits: the end is within the file, whose length is a usize.
        let start = (data_start + offset) as usize;
        let shape = shape.into_iter().map(|dim| dim as usize).collect();
        Ok(TensorInfo { name, element, shape, bytes: start..start + bytes as usize })
    }
}

struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
    items_left: u64,
    limits: &'a Limits,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, bytes: u64, what: &Place) -> Result<&'a [u8], GgufError> {
        let left = self.file.len() - self.at;
        if bytes > left as u64 {
            return Err(GgufError::Truncated { what: what.clone(), needed: bytes, left: left as u64 });
        }
        let start = self.at;
        self.at += bytes as usize;
        Ok(&self.file[start..self.at])
    }

    fn array<const N: usize>(&mut self, what: &Place) -> Result<[u8; N], GgufError> {
        Ok(self.take(N as u64, what)?.try_into().expect("took exactly N bytes"))
    }

    fn u32(&mut self, what: &Place) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &Place) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn count(&mut self, what: &Place, limit: u64) -> Result<u64, GgufError> {
        let value = self.u64(what)?;
        if value > limit {
            return Err(GgufError::Limit { what: what.clone(), value, limit });
        }
        Ok(value)
    }

    fn string(&mut self, what: &Place, limit: u64) -> Result<String, GgufError> {
        let len = self.count(what, limit)?;
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(GgufError::Utf8 { what: what.clone() }),
        }
    }

    fn bool(&mut self, what: &Place) -> Result<bool, GgufError> {
        match self.array::<1>(what)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(GgufError::Bool { what: what.clone(), value }),
        }
    }

    fn value(&mut self, what: &Place, number: u32, depth: u32) -> Result<Value, GgufError> {
        Ok(match number {
            0 => Value::Uint(u64::from(self.array::<1>(what)?[0])),
            1 => Value::Int(i64::from(i8::from_le_bytes(self.array(what)?))),
            2 => Value::Uint(u64::from(u16::from_le_bytes(self.array(what)?))),
            3 => Value::Int(i64::from(i16::from_le_bytes(self.array(what)?))),
            4 => Value::Uint(u64::from(self.u32(what)?)),
            5 => Value::Int(i64::from(i32::from_le_bytes(self.array(what)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array(what)?))),
            7 => Value::Bool(self.bool(what)?),
            8 => Value::Text(self.string(what, self.limits.string_bytes)?),
            9 => Value::List(self.list(what, depth)?),
            10 => Value::Uint(self.u64(what)?),
            11 => Value::Int(i64::from_le_bytes(self.array(what)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            number => return Err(GgufError::ValueType { what: what.clone(), number }),
        })
    }

    fn list(&mut self, what: &Place, depth: u32) -> Result<List, GgufError> {
        if depth == 0 {
            let limit = u64::from(self.limits.array_depth);
            return Err(GgufError::Limit { what: what.clone(), value: limit + 1, limit });
        }
        let number = self.u32(what)?;
        let len = self.u64(what)?;
        if len > self.items_left {
            return Err(GgufError::Limit { what: what.clone(), value: len, limit: self.items_left });
        }
        self.items_left -= len;
        Ok(match number {
            0 => List::Uints(self.items::<1, _>(what, len, |b| u64::from(b[0]))?),
            1 => List::Ints(self.items(what, len, |b| i64::from(i8::from_le_bytes(b)))?),
            2 => List::Uints(self.items(what, len, |b| u64::from(u16::from_le_bytes(b)))?),
            3 => List::Ints(self.items(what, len, |b| i64::from(i16::from_le_bytes(b)))?),
            4 => List::Uints(self.items(what, len, |b| u64::from(u32::from_le_bytes(b)))?),
            5 => List::Ints(self.items(what, len, |b| i64::from(i32::from_le_bytes(b)))?),
            6 => List::Floats(self.items(what, len, |b| f64::from(f32::from_le_bytes(b)))?),
            10 => List::Uints(self.items(what, len, u64::from_le_bytes)?),
            11 => List::Ints(self.items(what, len, i64::from_le_bytes)?),
            12 => List::Floats(self.items(what, len, f64::from_le_bytes)?),
            7 => List::Bools(self.each(what, len, 1, |c| c.bool(what))?),
            8 => List::Texts(self.each(what, len, 8, |c| c.string(what, c.limits.string_bytes))?),
            9 => List::Lists(self.each(what, len, 12, |c| c.list(what, depth - 1))?),
            number => return Err(GgufError::ValueType { what: what.clone(), number }),
        })
    }

    /// `len` items of `N` bytes each. The bytes are there before the vector is made.
    fn items<const N: usize, T>(
        &mut self,
        what: &Place,
        len: u64,
        read: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        let bytes = self.take(len.saturating_mul(N as u64), what)?;
        let (items, _) = bytes.as_chunks::<N>();
        Ok(items.iter().map(|item| read(*item)).collect())
    }

    /// `len` items of at least `bytes_min` bytes each.
    fn each<T>(
        &mut self,
        what: &Place,
        len: u64,
        bytes_min: u64,
        mut read: impl FnMut(&mut Self) -> Result<T, GgufError>,
    ) -> Result<Vec<T>, GgufError> {
        let left = (self.file.len() - self.at) as u64;
        let needed = len.saturating_mul(bytes_min);
        if needed > left {
            return Err(GgufError::Truncated { what: what.clone(), needed, left });
        }
        let mut items = Vec::with_capacity(len as usize);
        for _ in 0..len {
            items.push(read(self)?);
        }
        Ok(items)
    }

    fn tensor(&mut self, name: String) -> Result<DirectoryEntry, GgufError> {
        let what = Place::Tensor(name);
        let dims = self.u32(&what)?;
        if dims > self.limits.tensor_dims {
            let limit = u64::from(self.limits.tensor_dims);
            return Err(GgufError::Limit { what, value: u64::from(dims), limit });
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            shape.push(self.u64(&what)?);
        }
        let number = self.u32(&what)?;
        let offset = self.u64(&what)?;
        let Place::Tensor(name) = what else { unreachable!("made at the top") };
        let Some(element) = ElementType::from_ggml(number) else {
            return Err(GgufError::ElementType { tensor: name, number });
        };
        Ok(DirectoryEntry { name, shape, element, offset })
    }
}
