//! Checked access to a model's metadata, wherever it stands: in a GGUF file or in a `config.json`.

use std::borrow::Cow;

use super::spec::SpecError;
use crate::gguf::{Gguf, Value};

/// No dimension of a real model is larger; keeps products of two far from overflow.
pub(super) const SIZE_MAX: u64 = 1 << 24;

/// Real models have at most 126 layers. Memory is taken for each before its tensors are looked for.
const LAYERS_MAX: usize = 1024;

/// Scalars, and lists of scalars, by key.
pub(super) trait Metadata {
    fn get(&self, key: &str) -> Option<Cow<'_, Value>>;
}

impl Metadata for Gguf {
    fn get(&self, key: &str) -> Option<Cow<'_, Value>> {
        Gguf::get(self, key).map(Cow::Borrowed)
    }
}

/// The metadata under one prefix.
pub(super) struct Keys<'a, M> {
    pub(super) metadata: &'a M,
    /// With the dot that ends it; may be empty.
    pub(super) prefix: String,
}

impl<'a, M: Metadata> Keys<'a, M> {
    /// The whole key, for messages, and its value.
    pub(super) fn get(&self, key: &str) -> (String, Option<Cow<'a, Value>>) {
        let key = format!("{}{key}", self.prefix);
        let value = self.metadata.get(&key);
        (key, value)
    }

    fn missing<T>(&self, key: &str) -> Result<T, SpecError> {
        Err(SpecError::Missing { key: self.get(key).0 })
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, SpecError> {
        let (key, value) = self.get(key);
        let Some(value) = value else { return Ok(None) };
        let Some(size) = value.as_u64() else {
            return Err(SpecError::Kind { key, found: value.kind(), expected: "a count" });
        };
        if !(1..=SIZE_MAX).contains(&size) {
            return Err(SpecError::Range { key, value: size.to_string(), expected: "1 to 16777216" });
        }
        Ok(Some(size as usize))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, SpecError> {
        self.optional_size(key)?.map_or_else(|| self.missing(key), Ok)
    }

    pub(super) fn layers(&self, key: &str) -> Result<usize, SpecError> {
        let layers = self.size(key)?;
        if layers > LAYERS_MAX {
            let (key, _) = self.get(key);
            return Err(SpecError::Range { key, value: layers.to_string(), expected: "at most 1024" });
        }
        Ok(layers)
    }

    pub(super) fn optional_positive(&self, key: &str) -> Result<Option<f32>, SpecError> {
        let (key, value) = self.get(key);
        let Some(value) = value else { return Ok(None) };
        let Some(number) = value.as_f64() else {
            return Err(SpecError::Kind { key, found: value.kind(), expected: "a number" });
        };
        let number = number as f32;
        if !(number.is_finite() && number > 0.0) {
            return Err(SpecError::Range { key, value: number.to_string(), expected: "a number above zero" });
        }
        Ok(Some(number))
    }

    pub(super) fn positive(&self, key: &str) -> Result<f32, SpecError> {
        self.optional_positive(key)?.map_or_else(|| self.missing(key), Ok)
    }

    pub(super) fn optional_text(&self, key: &str) -> Result<Option<String>, SpecError> {
        let (key, value) = self.get(key);
        let Some(value) = value else { return Ok(None) };
        match value.as_str() {
            Some(text) => Ok(Some(text.to_owned())),
            None => Err(SpecError::Kind { key, found: value.kind(), expected: "a string" }),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<String, SpecError> {
        self.optional_text(key)?.map_or_else(|| self.missing(key), Ok)
    }

    pub(super) fn optional_flag(&self, key: &str) -> Result<Option<bool>, SpecError> {
        let (key, value) = self.get(key);
        let Some(value) = value else { return Ok(None) };
        match value.as_bool() {
            Some(flag) => Ok(Some(flag)),
            None => Err(SpecError::Kind { key, found: value.kind(), expected: "a boolean" }),
        }
    }

    /// A soft cap changes every score or logit, and none of our kernels has one. Zero means none.
    pub(super) fn no_soft_cap(&self, key: &str, on: &str) -> Result<(), SpecError> {
        let (key, value) = self.get(key);
        if value.is_some_and(|value| value.as_f64() != Some(0.0)) {
            return Err(SpecError::Unsupported { what: format!("a soft cap on {on} (`{key}`)") });
        }
        Ok(())
    }
}
