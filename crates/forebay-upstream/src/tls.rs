//! TLS towards upstreams: trusted roots, and a client configuration made on first use.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::error::BoxError;

/// Whom to trust for `https://` upstreams.
#[derive(Debug, Clone, Default)]
pub enum Roots {
    /// The operating system's store, read at the first `https://` connection.
    #[default]
    Native,
    /// These certificates only, in PEM.
    Pem(Vec<u8>),
}

#[derive(Debug, thiserror::Error)]
enum RootsError {
    #[error("the system has no trusted root certificates")]
    None,
    #[error("the PEM text with root certificates is not valid")]
    Pem(#[source] rustls::pki_types::pem::Error),
}

/// TLS 1.2 and 1.3, ALPN `http/1.1`: the connections we make carry one request at a time (see the crate's doc).
pub(crate) fn client_config(roots: &Roots) -> Result<Arc<rustls::ClientConfig>, BoxError> {
    let mut store = rustls::RootCertStore::empty();
    match roots {
        Roots::Native => {
            let loaded = rustls_native_certs::load_native_certs();
            // A store often has a few certificates that can't be read; what matters is that some can.
            store.add_parsable_certificates(loaded.certs);
        }
        Roots::Pem(pem) => {
            for cert in CertificateDer::pem_slice_iter(pem) {
                store.add(cert.map_err(RootsError::Pem)?)?;
            }
        }
    }
    if store.is_empty() {
        return Err(RootsError::None.into());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
