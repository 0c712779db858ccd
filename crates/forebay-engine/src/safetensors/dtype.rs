//! The number formats of the format, and how many bytes a value has.
//!
//! All of whole bytes that a file may have, not only those we can compute with: a BERT file carries the positions'
//! numbers as I64, which nobody reads.

use std::fmt;

/// Type of a tensor's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dtype(usize);

/// `(name, bytes)`; from the crate's `Dtype`.
const TABLE: &[(&str, usize)] = &[
    ("F32", 4),
    ("F16", 2),
    ("BF16", 2),
    ("BOOL", 1),
    ("U8", 1),
    ("I8", 1),
    ("F8_E5M2", 1),
    ("F8_E4M3", 1),
    ("F8_E8M0", 1),
    ("F8_E4M3FNUZ", 1),
    ("F8_E5M2FNUZ", 1),
    ("I16", 2),
    ("U16", 2),
    ("I32", 4),
    ("U32", 4),
    ("F64", 8),
    ("I64", 8),
    ("U64", 8),
    ("C64", 8),
];

impl Dtype {
    pub const F32: Self = Self(0);
    pub const F16: Self = Self(1);
    pub const BF16: Self = Self(2);

    /// As a header spells it.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().position(|row| row.0 == name).map(Self)
    }

    pub fn name(self) -> &'static str {
        TABLE[self.0].0
    }

    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        TABLE[self.0].1
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
