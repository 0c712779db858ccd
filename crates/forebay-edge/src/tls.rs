//! The server's TLS configuration: TLS 1.2 and 1.3, HTTP/2 offered first.

use std::path::PathBuf;
use std::sync::Arc;

use forebay_config::{Environment, Secret, SecretError};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};

use crate::config::{EdgeConfigError, TlsConfig};

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
    #[error(
        "`{key}` of `edge.tls.key` is not a PEM private key (PKCS#8, PKCS#1 or SEC1, without a passphrase)"
    )]
    BadKey { key: Secret },
    #[error("the first certificate in `{}` can't be used", path.display())]
    CertUnusable { path: PathBuf, source: rustls::Error },
    #[error(
        "the private key `{key}` of `edge.tls.key` is of a kind that is not supported; use ECDSA, Ed25519 or RSA"
    )]
    KeyUnsupported { key: Secret, source: rustls::Error },
    #[error(
        "the private key `{key}` does not belong to the first certificate in `{}`; correct `edge.tls.key` or \
         `edge.tls.cert`", cert.display()
    )]
    Mismatch { key: Secret, cert: PathBuf },
    #[error("TLS can't be set up")]
    Setup(#[source] rustls::Error),
}

impl TlsError {
    /// The key of the configuration, below `edge`.
    fn key(&self) -> &'static str {
        match self {
            Self::CertUnreadable { .. }
            | Self::NoCert { .. }
            | Self::BadCert { .. }
            | Self::CertUnusable { .. } => "tls.cert",
            Self::KeySecret(_)
            | Self::BadKey { .. }
            | Self::KeyUnsupported { .. }
            | Self::Mismatch { .. } => "tls.key",
            Self::Setup(_) => "tls",
        }
    }
}

impl TlsConfig {
    /// Everything that is wrong with the files: each is read and parsed, and the key must be the certificate's.
    /// Blocking.
    pub fn problems(&self, env: &dyn Environment) -> Vec<EdgeConfigError> {
        let errors = match (read_chain(self, env), read_key(self, env)) {
            (Ok(chain), Ok(key)) => certified(self, chain, key).err().into_iter().collect(),
            (chain, key) => chain.err().into_iter().chain(key.err()).collect::<Vec<_>>(),
        };
        let problems = errors.into_iter().map(|error| {
            let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
            let problem = format!("{error}{}", source.unwrap_or_default());
            EdgeConfigError { key: error.key().to_owned(), problem }
        });
        problems.collect()
    }
}

fn read_chain(config: &TlsConfig, env: &dyn Environment) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let path = || config.cert.clone();
    let pem =
        env.read_file(&config.cert).map_err(|source| TlsError::CertUnreadable { path: path(), source })?;
    let chain = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| TlsError::BadCert { path: path(), source })?;
    if chain.is_empty() {
        return Err(TlsError::NoCert { path: path() });
    }
    Ok(chain)
}

fn read_key(config: &TlsConfig, env: &dyn Environment) -> Result<PrivateKeyDer<'static>, TlsError> {
    let key = config.key.resolve(env).map_err(TlsError::KeySecret)?;
    PrivateKeyDer::from_pem_slice(key.expose().as_bytes())
        .map_err(|_| TlsError::BadKey { key: config.key.clone() })
}

fn certified(
    config: &TlsConfig,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<CertifiedKey, TlsError> {
    let key = rustls::crypto::ring::sign::any_supported_type(&key)
        .map_err(|source| TlsError::KeyUnsupported { key: config.key.clone(), source })?;
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        // Some kinds of key can't be compared; then the first handshake tells.
        Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => Ok(certified),
        Err(rustls::Error::InconsistentKeys(_)) => {
            Err(TlsError::Mismatch { key: config.key.clone(), cert: config.cert.clone() })
        }
        Err(source) => Err(TlsError::CertUnusable { path: config.cert.clone(), source }),
    }
}

/// Reads certificate and key. Blocking; for the start.
pub(crate) fn server_config(
    config: &TlsConfig,
    env: &dyn Environment,
) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let certified = certified(config, read_chain(config, env)?, read_key(config, env)?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(server))
}
