//! L3: model names, fallback chains, retries, providers.
