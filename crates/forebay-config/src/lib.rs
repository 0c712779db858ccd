//! Loads a YAML file into typed configuration, with diagnostics that point at line and column.
//!
//! ```text
//! error: unknown key `queued-token-max` in `router`
//!  --> forebay.yaml:14:3
//!    |
//! 14 |   queued-token-max: 10
//!    |   ^^^^^^^^^^^^^^^^ did you mean `queued-tokens-max`?
//!    = help: uncached prompt tokens a worker may have waiting before it is skipped
//! ```
//!
//! [`load`] reads text into any `Deserialize` type and reports every independent mistake at once; [`Loaded`] lets
//! later checks point into the file; [`HumanDuration`], [`ByteSize`], [`ListenAddr`], [`Secret`] and [`OneOrMany`]
//! are the values people write; [`schema`] and [`reference_markdown`] describe them.
//!
//! Deliberately absent: the configuration of any layer (it stands beside the layer), interpolation of `${NAME}`,
//! includes, and more than one file. Only [`RealEnvironment`], [`Source::read`] and [`read_limited`] touch the machine.

mod de;
mod diagnostic;
mod environment;
mod limited;
mod loader;
mod parse;
mod path;
mod redact;
mod reference;
mod render;
mod schema;
mod schema_view;
mod source;
mod suggest;
mod tree;
mod values;

pub use diagnostic::{Diagnostic, Diagnostics, Severity};
pub use environment::{Environment, FixedEnvironment, RealEnvironment, SECRET_FILE_BYTES_MAX};
pub use limited::read_limited;
pub use loader::{Loaded, load};
pub use reference::reference_markdown;
pub use schema::schema;
pub use source::{FILE_BYTES_MAX, Position, Source, SourceError, Span};
pub use suggest::closest;
pub use values::{
    ByteSize, HumanDuration, ListenAddr, OneOrMany, ParseByteSizeError, ParseHumanDurationError,
    ParseListenAddrError, ParseSecretError, Secret, SecretError, SecretValue,
};
