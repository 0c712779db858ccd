//! OpenAI JSON to one canonical call, canonical events to OpenAI JSON and SSE. Pure.
