//! The configuration of configurations, the composition of the layers, and the roles a process can have.
//!
//! **Invariant:** [`compose`] is the only module that names two layers; everything else here deals with files,
//! ports, signals and people.

mod admin;
pub mod check;
pub mod compose;
pub mod config;
mod error;
pub mod model;
mod operator;
mod serve;
pub mod slots;

pub use config::{AdminConfig, Config};
pub use error::{BuildError, one_line};
pub use serve::{Ready, StartError, Summary, VERSION, prepare};
