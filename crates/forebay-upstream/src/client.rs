//! [`HttpClient`]: sends a request to an absolute URL over a pooled connection.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;

use crate::error::UpstreamError;
use crate::pool::{Connection, Host, Limits, Place, Pool, RequestBody, ResponseBody};
pub use crate::tls::Roots;

/// How the client dials and pools.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Name lookup, TCP and TLS together; also the wait for a free connection at the limit.
    pub connect_timeout: Duration,
    /// Default 4 s: uvicorn (vLLM) and Node close after 5 s, and a request sent just as the other side closes is
    /// lost. Closing first avoids the race.
    pub idle_timeout: Duration,
    /// Idle connections kept per host.
    pub idle_per_host_max: usize,
    /// Connections in use per host, and so requests in flight to it.
    pub connections_per_host_max: usize,
    /// Largest answer head in bytes.
    pub head_bytes_max: usize,
    pub roots: Roots,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(4),
            idle_per_host_max: 256,
            connections_per_host_max: 4096,
            head_bytes_max: 64 * 1024,
            roots: Roots::Native,
        }
    }
}

/// An HTTP/1.1 client with a pool per host. Cheap to clone; clones share the pool.
#[derive(Clone)]
pub struct HttpClient(Arc<Inner>);

struct Inner {
    config: ClientConfig,
    pool: Pool,
    tls: OnceLock<Arc<rustls::ClientConfig>>,
}

/// An answer read to its end.
#[derive(Debug, Clone)]
pub struct Collected {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// A body of known bytes.
pub fn full(bytes: impl Into<Bytes>) -> RequestBody {
    http_body_util::Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

impl HttpClient {
    /// Opens nothing yet. TLS roots are read at the first `https://` connection.
    pub fn new(config: ClientConfig) -> Self {
        let limits = Limits {
            connections_max: config.connections_per_host_max.max(1),
            idle_max: config.idle_per_host_max,
            idle_timeout: config.idle_timeout,
        };
        Self(Arc::new(Inner { config, pool: Pool::new(limits), tls: OnceLock::new() }))
    }

    /// Sends a request whose URI is absolute. `host` is set from it unless present; framing headers are made here.
    ///
    /// Only connecting has a time limit; wrap the future for more. Cancellation: guarded; dropping the future, or
    /// the body before its end, closes the connection.
    pub async fn send(&self, request: Request<RequestBody>) -> Result<Response<ResponseBody>, UpstreamError> {
        self.send_over(request, true).await
    }

    /// Like [`HttpClient::send`], over a new connection: for a request that met [`UpstreamError::Stale`] and may be
    /// repeated.
    pub async fn send_fresh(
        &self,
        request: Request<RequestBody>,
    ) -> Result<Response<ResponseBody>, UpstreamError> {
        self.send_over(request, false).await
    }

    async fn send_over(
        &self,
        request: Request<RequestBody>,
        pooled: bool,
    ) -> Result<Response<ResponseBody>, UpstreamError> {
        let (mut parts, body) = request.into_parts();
        let place = place_of(&parts.uri)?;
        let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
        let origin_form = path.parse().map_err(|_| UpstreamError::Url { why: "bad path" })?;
        parts.uri = origin_form;
        parts.version = http::Version::HTTP_11;
        if !parts.headers.contains_key(header::HOST) {
            let host = HeaderValue::from_str(&place.authority)
                .map_err(|_| UpstreamError::Url { why: "bad host name" })?;
            parts.headers.insert(header::HOST, host);
        }
        let mut request = Request::from_parts(parts, body);

        let host = self.0.pool.host(&place);
        let permit = self.permit(&host).await?;
        // A pooled connection may turn out to be closed before it took the request: then hyper hands the request
        // back, and the next connection is tried. The loop ends because every round uses up an idle connection.
        while pooled && let Some(mut connection) = host.reuse().await {
            match connection.sender.try_send_request(request).await {
                Ok(response) => return Ok(finish(response, connection, permit)),
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => {
                        let error = UpstreamError::from_hyper(&place.authority, error.into_error(), false);
                        return Err(error.on_reused());
                    }
                },
            }
        }
        // Boxed: dialling is rare, and its TLS handshake would make every request's future as large as itself.
        let mut connection = Box::pin(self.connect(&host)).await?;
        match connection.sender.try_send_request(request).await {
            Ok(response) => Ok(finish(response, connection, permit)),
            Err(mut error) => {
                let unsent = error.take_message().is_some();
                Err(UpstreamError::from_hyper(&place.authority, error.into_error(), unsent))
            }
        }
    }

    /// Sends, and reads the whole answer, within `timeout` and `body_bytes_max`.
    pub async fn exchange(
        &self,
        request: Request<RequestBody>,
        body_bytes_max: usize,
        timeout: Duration,
    ) -> Result<Collected, UpstreamError> {
        let authority = request.uri().authority().map(|a| a.as_str().to_owned()).unwrap_or_default();
        let whole = async {
            let (parts, body) = self.send(request).await?.into_parts();
            let body = collect(body, body_bytes_max, &authority).await?;
            Ok(Collected { status: parts.status, headers: parts.headers, body })
        };
        match tokio::time::timeout(timeout, whole).await {
            Ok(result) => result,
            Err(_) => Err(UpstreamError::FirstByteTimeout { authority, after: timeout }),
        }
    }

    /// Waits for a place among the connections in use.
    async fn permit(&self, host: &Arc<Host>) -> Result<OwnedSemaphorePermit, UpstreamError> {
        let limit = self.0.config.connections_per_host_max.max(1);
        let acquire = host.permits.clone().acquire_owned();
        match tokio::time::timeout(self.0.config.connect_timeout, acquire).await {
            Ok(Ok(permit)) => Ok(permit),
            // Too late; the semaphore itself is never closed.
            Ok(Err(_)) | Err(_) => {
                Err(UpstreamError::Busy { authority: host.place.authority.clone(), limit })
            }
        }
    }

    async fn connect(&self, host: &Arc<Host>) -> Result<Connection, UpstreamError> {
        let after = self.0.config.connect_timeout;
        let authority = || host.place.authority.clone();
        // Each dial has its own time limit, so that one stalled handshake costs one request, not the pool.
        let io = tokio::time::timeout(after, self.dial(&host.place))
            .await
            .map_err(|_| UpstreamError::ConnectTimeout { authority: authority(), after })??;
        let (sender, driver) = match io {
            Dialled::Plain(tcp) => self.handshake(&host.place, tcp).await?,
            Dialled::Tls(tls) => self.handshake(&host.place, *tls).await?,
        };
        Ok(Connection::new(sender, driver, host.clone()))
    }

    async fn dial(&self, place: &Place) -> Result<Dialled, UpstreamError> {
        let authority = || place.authority.clone();
        let connect = |source| UpstreamError::Connect { authority: authority(), source };
        let tcp = TcpStream::connect((place.host.as_str(), place.port)).await.map_err(connect)?;
        // A token's frame must not wait for the ack of the one before (Nagle and delayed ack make 40 ms).
        tcp.set_nodelay(true).map_err(connect)?;
        if !place.tls {
            return Ok(Dialled::Plain(tcp));
        }
        let config = match self.0.tls.get() {
            Some(config) => config.clone(),
            None => {
                let made = crate::tls::client_config(&self.0.config.roots)
                    .map_err(|source| UpstreamError::Tls { authority: authority(), source })?;
                self.0.tls.get_or_init(|| made).clone()
            }
        };
        let name = rustls::pki_types::ServerName::try_from(place.host.clone())
            .map_err(|source| UpstreamError::Tls { authority: authority(), source: source.into() })?;
        let tls = tokio_rustls::TlsConnector::from(config)
            .connect(name, tcp)
            .await
            .map_err(|source| UpstreamError::Tls { authority: authority(), source: source.into() })?;
        Ok(Dialled::Tls(Box::new(tls)))
    }

    async fn handshake<I>(
        &self,
        place: &Place,
        io: I,
    ) -> Result<
        (hyper::client::conn::http1::SendRequest<RequestBody>, tokio::task::JoinHandle<()>),
        UpstreamError,
    >
    where
        I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
    {
        let (sender, connection) = hyper::client::conn::http1::Builder::new()
            .max_buf_size(self.0.config.head_bytes_max.max(8 * 1024))
            .handshake(TokioIo::new(io))
            .await
            .map_err(|error| UpstreamError::from_hyper(&place.authority, error, true))?;
        let driver = tokio::spawn(async move {
            // Whoever waits for the answer gets the same error.
            if let Err(error) = connection.await {
                tracing::trace!(%error, "upstream connection ended");
            }
        });
        Ok((sender, driver))
    }
}

impl Default for HttpClient {
    fn default() -> Self {
        Self::new(ClientConfig::default())
    }
}

impl std::fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpClient").field("config", &self.0.config).finish_non_exhaustive()
    }
}

enum Dialled {
    Plain(TcpStream),
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

fn finish(
    response: Response<hyper::body::Incoming>,
    connection: Connection,
    permit: OwnedSemaphorePermit,
) -> Response<ResponseBody> {
    response.map(|incoming| ResponseBody::new(incoming, connection, permit))
}

/// Reads a body to its end; more than `bytes_max` is an error and closes the connection.
pub(crate) async fn collect(
    mut body: ResponseBody,
    bytes_max: usize,
    authority: &str,
) -> Result<Bytes, UpstreamError> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        if first.len() + rest.len() + data.len() > bytes_max {
            return Err(UpstreamError::AnswerTooLarge { authority: authority.to_owned(), limit: bytes_max });
        }
        // Most bodies come in one piece and are then not copied.
        if first.is_empty() && rest.is_empty() {
            first = data;
        } else {
            rest.extend_from_slice(&std::mem::take(&mut first));
            rest.extend_from_slice(&data);
        }
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}

fn place_of(uri: &Uri) -> Result<Place, UpstreamError> {
    let tls = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        Some(_) => return Err(UpstreamError::Url { why: "the scheme is neither http nor https" }),
        None => return Err(UpstreamError::Url { why: "there is no scheme" }),
    };
    let authority = uri.authority().ok_or(UpstreamError::Url { why: "there is no host" })?;
    if authority.as_str().contains('@') {
        return Err(UpstreamError::Url { why: "user names in URLs are not supported" });
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
    if host.is_empty() {
        return Err(UpstreamError::Url { why: "there is no host" });
    }
    let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
    Ok(Place { tls, host, port, authority: authority.as_str().to_owned() })
}
