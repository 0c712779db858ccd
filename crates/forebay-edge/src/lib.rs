//! L1: TLS, HTTP/1.1 and HTTP/2, routes, limits, streaming, drain.
