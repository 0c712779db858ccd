//! The server's TLS configuration: TLS 1.2 and 1.3, HTTP/2 offered first.

use std::path::PathBuf;
use std::sync::Arc;

use forebay_config::{Environment, SecretError};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::TlsConfig;

/// Why the certificate or key can't be used. Never holds the key.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("certificate file `{}` can't be read; correct `edge.tls.cert`", path.display())]
    CertUnreadable { path: PathBuf, source: std::io::Error },
    #[error("`{}` holds no PEM certificate; `edge.tls.cert` is the chain, the server's own certificate first", path.display())]
    NoCert { path: PathBuf },
    #[error("`{}` holds a certificate that is not valid PEM", path.display())]
    BadCert { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("the key of `edge.tls.key` can't be fetched")]
    KeySecret(#[source] SecretError),
    #[error("`edge.tls.key` is not a PEM private key (PKCS#8, PKCS#1 or SEC1, without a passphrase)")]
    BadKey,
    #[error("certificate and key don't fit together, or their kind is not supported")]
    Mismatch(#[source] rustls::Error),
}

/// Reads certificate and key. Blocking; for the start.
pub(crate) fn server_config(
    config: &TlsConfig,
    env: &dyn Environment,
) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let path = || config.cert.clone();
    let pem =
        env.read_file(&config.cert).map_err(|source| TlsError::CertUnreadable { path: path(), source })?;
    let chain = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| TlsError::BadCert { path: path(), source })?;
    if chain.is_empty() {
        return Err(TlsError::NoCert { path: path() });
    }
    let key = config.key.resolve(env).map_err(TlsError::KeySecret)?;
    let key = PrivateKeyDer::from_pem_slice(key.expose().as_bytes()).map_err(|_| TlsError::BadKey)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Mismatch)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(TlsError::Mismatch)?;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(server))
}
