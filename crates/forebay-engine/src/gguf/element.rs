//! ggml's element types: how many values and bytes one block has.
//!
//! All types that a file may have, not only those we can compute with, so that a file with an exotic type is
//! reported by that type's name.

/// Type of a tensor's elements, as ggml numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ElementType(u32);

/// `(ggml number, name, values per block, bytes per block)`; from ggml's `type_traits` table.
const TABLE: &[(u32, &str, usize, usize)] = &[
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
];

impl ElementType {
    pub const F32: Self = Self(0);
    pub const F16: Self = Self(1);
    pub const Q4_0: Self = Self(2);
    pub const Q4_1: Self = Self(3);
    pub const Q5_0: Self = Self(6);
    pub const Q5_1: Self = Self(7);
    pub const Q8_0: Self = Self(8);
    pub const Q4_K: Self = Self(12);
    pub const Q5_K: Self = Self(13);
    pub const Q6_K: Self = Self(14);
    pub const BF16: Self = Self(30);

    /// `None` for a number that ggml does not define (or no longer does).
    pub fn from_ggml(number: u32) -> Option<Self> {
        TABLE.iter().any(|row| row.0 == number).then_some(Self(number))
    }

    pub fn ggml(self) -> u32 {
        self.0
    }

    fn row(self) -> &'static (u32, &'static str, usize, usize) {
        TABLE.iter().find(|row| row.0 == self.0).expect("only made from numbers of the table")
    }

    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Values per block: rows are whole blocks.
    pub fn block_len(self) -> usize {
        self.row().2
    }

    pub fn block_bytes(self) -> usize {
        self.row().3
    }
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
