//! L4: replicas, health, prefix-aware placement.
