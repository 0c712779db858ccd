//! KV block hashes, KV events and the prefix index shared by router and engine. Pure.
