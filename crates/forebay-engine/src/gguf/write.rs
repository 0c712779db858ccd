//! Writes GGUF version 3 files. For tests and small tools: everything is held in memory.

use super::{ElementType, List, Value};

/// Collects metadata and tensors, then lays the file out.
#[derive(Debug, Default)]
pub struct Writer {
    metadata: Vec<(String, Vec<u8>)>,
    tensors: Vec<Pending>,
}

#[derive(Debug)]
struct Pending {
    name: String,
    shape: Vec<usize>,
    element: ElementType,
    bytes: Vec<u8>,
}

const ALIGNMENT: usize = 32;

impl Writer {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one entry. Integers become u32/i32 and numbers f32 where nothing is lost, as most writers do.
    pub fn put(&mut self, key: &str, value: &Value) -> &mut Self {
        let mut bytes = Vec::new();
        match value {
            Value::Uint(v) => match u32::try_from(*v) {
                Ok(v) => tagged(&mut bytes, 4, &v.to_le_bytes()),
                Err(_) => tagged(&mut bytes, 10, &v.to_le_bytes()),
            },
            Value::Int(v) => match i32::try_from(*v) {
                Ok(v) => tagged(&mut bytes, 5, &v.to_le_bytes()),
                Err(_) => tagged(&mut bytes, 11, &v.to_le_bytes()),
            },
            Value::Float(v) if f64::from(*v as f32) == *v => {
                tagged(&mut bytes, 6, &(*v as f32).to_le_bytes());
            }
            Value::Float(v) => tagged(&mut bytes, 12, &v.to_le_bytes()),
            Value::Bool(v) => tagged(&mut bytes, 7, &[u8::from(*v)]),
            Value::Text(v) => {
                tagged(&mut bytes, 8, &[]);
                text(&mut bytes, v);
            }
            Value::List(v) => {
                tagged(&mut bytes, 9, &[]);
                list(&mut bytes, v);
            }
        }
        self.metadata.push((key.to_owned(), bytes));
        self
    }

    pub fn put_u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.put(key, &Value::Uint(u64::from(value)))
    }

    pub fn put_f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.put(key, &Value::Float(f64::from(value)))
    }

    pub fn put_text(&mut self, key: &str, value: &str) -> &mut Self {
        self.put(key, &Value::Text(value.to_owned()))
    }

    /// Adds a tensor; `shape` has the innermost dimension first.
    ///
    /// # Panics
    /// If `bytes` is not of the size that `shape` asks for.
    pub fn tensor(&mut self, name: &str, shape: &[usize], element: ElementType, bytes: Vec<u8>) -> &mut Self {
        let values: usize = shape.iter().product();
        assert_eq!(bytes.len(), values / element.block_len() * element.block_bytes(), "tensor `{name}`");
        self.tensors.push(Pending { name: name.to_owned(), shape: shape.to_vec(), element, bytes });
        self
    }

    pub fn tensor_f32(&mut self, name: &str, shape: &[usize], values: &[f32]) -> &mut Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, shape, ElementType::F32, bytes)
    }

    /// The bytes of the whole file.
    pub fn finish(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            out.extend(value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            for &dim in &tensor.shape {
                out.extend((dim as u64).to_le_bytes());
            }
            out.extend(tensor.element.ggml().to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += tensor.bytes.len().next_multiple_of(ALIGNMENT);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
            out.extend(&tensor.bytes);
        }
        out
    }
}

fn tagged(out: &mut Vec<u8>, kind: u32, payload: &[u8]) {
    out.extend(kind.to_le_bytes());
    out.extend(payload);
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn list(out: &mut Vec<u8>, list: &List) {
    fn head(out: &mut Vec<u8>, kind: u32, len: usize) {
        tagged(out, kind, &(len as u64).to_le_bytes());
    }
    match list {
        List::Uints(items) => {
            head(out, 10, items.len());
            items.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        List::Ints(items) => {
            head(out, 11, items.len());
            items.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        List::Floats(items) => {
            head(out, 12, items.len());
            items.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        List::Bools(items) => {
            head(out, 7, items.len());
            items.iter().for_each(|v| out.push(u8::from(*v)));
        }
        List::Texts(items) => {
            head(out, 8, items.len());
            items.iter().for_each(|v| text(out, v));
        }
        List::Lists(items) => {
            head(out, 9, items.len());
            items.iter().for_each(|v| self::list(out, v));
        }
    }
}
