//! The JSON schema of a configuration: for editors, for help in diagnostics, for the reference page.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;

/// The schema of `T` as JSON, draft 2020-12, keys in the order of the fields. Deterministic.
///
/// Defaults are in it as far as the fields' types serialize; a [`Secret`](crate::Secret) shows none.
pub fn schema<T: JsonSchema>() -> serde_json::Value {
    SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>().to_value()
}
