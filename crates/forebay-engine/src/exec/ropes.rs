//! The rotations of a model's layers.

use forebay_kernels::RopeTable;

use crate::model::{ModelSpec, Rope};

/// Cosines and sines of every kind of rotation that a model's layers have: one or two.
pub(super) struct RopeTables {
    tables: Vec<RopeTable>,
    /// For each layer, which of the tables is its own.
    of_layer: Vec<usize>,
}

impl RopeTables {
    pub(super) fn new(spec: &ModelSpec, factors: Option<&[f32]>, positions_max: usize) -> Self {
        let mut kinds: Vec<&Rope> = Vec::new();
        let of_layer = spec.attention.iter().map(|layer| {
            kinds.iter().position(|kind| **kind == layer.rope).unwrap_or_else(|| {
                kinds.push(&layer.rope);
                kinds.len() - 1
            })
        });
        let of_layer = of_layer.collect();
        let table = |rope: &&Rope| {
            // Dividing a frequency is the same as dividing every position.
            let by = |pair: usize| factors.map_or(1.0, |f| f[pair]) * rope.linear_factor;
            let factors: Vec<f32> = (0..rope.dims / 2).map(by).collect();
            RopeTable::new(rope.dims, rope.base, positions_max, Some(&factors))
        };
        Self { tables: kinds.iter().map(table).collect(), of_layer }
    }

    pub(super) fn of(&self, layer: usize) -> &RopeTable {
        &self.tables[self.of_layer[layer]]
    }
}
