//! HTTP client side: pooled connections to upstreams, SSE frames read as they come.
