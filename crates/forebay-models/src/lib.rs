//! Model store: names to files, fetched, verified and cached.
