//! Loads a YAML file into typed configuration, with diagnostics that point at line and column.
