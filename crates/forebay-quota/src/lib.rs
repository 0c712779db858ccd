//! Token buckets, reservations and their settlement. Pure.
