//! L2: API keys, token and request quotas, audit.
