//! The configuration of configurations, the composition of the layers, and the admin API.
