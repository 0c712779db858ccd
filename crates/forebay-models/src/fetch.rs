//! Downloads one file into place: resumes where it can, starts clean where it can't, verifies before it is seen.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use forebay_upstream::{HttpClient, full};
use http::{Request, StatusCode, header};
use http_body_util::BodyExt;
use sha2::{Digest, Sha256};

use crate::snapshot::IndexError;
use crate::store::Progress;

pub(crate) const USER_AGENT: &str = concat!("forebay/", env!("CARGO_PKG_VERSION"));

/// Of a file that is not weights: no tokenizer and no index that is published has more than a quarter of it.
pub(crate) const SMALL_BYTES_MAX: u64 = 256 << 20;
/// Of a file of weights: what the hub stores at most.
pub(crate) const WEIGHTS_BYTES_MAX: u64 = 500 << 30;
/// Hubs answer with a redirect to storage; more than a few is a loop.
const REDIRECTS_MAX: usize = 5;
/// From the request to the answer's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two pieces of the body: a stalled download fails and is resumed by the next try.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a file could not be fetched from one source.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("can't connect: {why}")]
    Connect { why: String },
    #[error("no data for {} s", STALL_TIMEOUT.as_secs())]
    Stalled,
    #[error("the connection broke off at {at} bytes: {why}; run the same command again to resume")]
    Broken { at: u64, why: String },
    #[error("the server answered {status} for {}{}", shown(url), hint(*.status))]
    Status { status: u16, url: String },
    #[error("`{}` is not a URL that can be fetched", shown(url))]
    BadUrl { url: String },
    #[error("more than {REDIRECTS_MAX} redirects")]
    Redirects,
    #[error("the file has {found} bytes, {expected} expected; it was removed")]
    Size { expected: u64, found: u64 },
    #[error("the SHA-256 is {found}, {expected} expected; the file was removed")]
    Checksum { expected: String, found: String },
    #[error("the hub's file list of `{repo}` can't be read")]
    BadListing { repo: String },
    #[error(
        "`{repo}` has no GGUF file of a supported type{}, and no safetensors model: there is no {}",
        if files.is_empty() { String::new() } else { format!(" (it has {}; name one: `hf:{repo}/FILE`)", files.join(", ")) },
        lacking.join(" and no ")
    )]
    NoUsableFile { repo: String, files: Vec<String>, lacking: Vec<&'static str> },
    #[error("`model.safetensors.index.json` of `{repo}`: {why}")]
    BadIndex { repo: String, why: IndexError },
    #[error("{url} has more than {limit} bytes, which no file of its kind has")]
    TooLarge { url: String, limit: u64 },
    #[error("can't write {}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("`{program}` can't be run: {why}")]
    Program { program: String, why: String },
}

fn hint(status: u16) -> &'static str {
    match status {
        401 | 403 => " (a gated repository? set HF_TOKEN)",
        404 => " (no such repository or file)",
        429 => " (too many requests; try again later)",
        _ => "",
    }
}

/// A URL as people may see it. Queries are signatures, and before an `@` stands a password.
pub(crate) fn shown(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority.rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{host}{path}")
}

/// What the file must be, as far as it is known before.
pub(crate) struct Expect {
    pub bytes: Option<u64>,
    /// Whatever the server says, not more than this is written.
    pub bytes_max: u64,
    pub sha256: Option<String>,
}

/// Downloads `url` to `target` by way of `target.part`.
///
/// Cancellation: guarded. What has been written stays in the `.part` file and the next call resumes from it.
pub(crate) async fn download(
    client: &HttpClient,
    url: &str,
    token: Option<&str>,
    target: &Path,
    mut expect: Expect,
    progress: &dyn Progress,
) -> Result<(), FetchError> {
    let part = part_of(target);
    let have = fs::metadata(&part).map_or(0, |m| m.len());
    // A part that is already too long is of another file.
    let have = if expect.bytes.is_some_and(|bytes| have > bytes) { 0 } else { have };
    let complete = expect.bytes == Some(have) && have > 0;
    if !complete && let Some((response, start)) = open(client, url, token, have, &mut expect).await? {
        let left = content_length(response.headers());
        let total = expect.bytes.or(left.map(|left| left.saturating_add(start)));
        if total.is_some_and(|total| total > expect.bytes_max) {
            return Err(FetchError::TooLarge { url: shown(url), limit: expect.bytes_max });
        }
        progress.begin(total, start);
        let mut file = open_part(&part, start)?;
        let mut written = start;
        let mut body = response.into_body();
        loop {
            let frame = match tokio::time::timeout(STALL_TIMEOUT, body.frame()).await {
                Err(_) => return Err(FetchError::Stalled),
                Ok(None) => break,
                Ok(Some(Err(error))) => {
                    return Err(FetchError::Broken { at: written, why: error.to_string() });
                }
                Ok(Some(Ok(frame))) => frame,
            };
            let Ok(data) = frame.into_data() else { continue };
            file.write_all(&data).map_err(|source| FetchError::Write { path: part.clone(), source })?;
            written += data.len() as u64;
            progress.advance(data.len() as u64);
            if expect.bytes.is_some_and(|bytes| written > bytes) {
                break;
            }
            if written > expect.bytes_max {
                let _ = fs::remove_file(&part);
                return Err(FetchError::TooLarge { url: shown(url), limit: expect.bytes_max });
            }
        }
        file.sync_all().map_err(|source| FetchError::Write { path: part.clone(), source })?;
        if let Some(total) = total
            && written < total
        {
            return Err(FetchError::Broken { at: written, why: "closed early".into() });
        }
    }
    settle(&part, target, &expect, progress).await
}

/// Verifies `part` and gives it its final name; a wrong file is removed, so that the next try starts clean.
pub(crate) async fn settle(
    part: &Path,
    target: &Path,
    expect: &Expect,
    progress: &dyn Progress,
) -> Result<(), FetchError> {
    let write = |source| FetchError::Write { path: target.to_owned(), source };
    let found = fs::metadata(part).map_err(write)?.len();
    if let Some(expected) = expect.bytes
        && found != expected
    {
        let _ = fs::remove_file(part);
        return Err(FetchError::Size { expected, found });
    }
    if let Some(expected) = &expect.sha256 {
        progress.verifying();
        // Seconds for a large file: off this thread, so that whoever waits for us can still be interrupted.
        let path = part.to_owned();
        let hashed = tokio::task::spawn_blocking(move || sha256(&path)).await;
        let found = hashed.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(write)?;
        if !found.eq_ignore_ascii_case(expected) {
            let _ = fs::remove_file(part);
            return Err(FetchError::Checksum { expected: expected.clone(), found });
        }
    }
    fs::rename(part, target).map_err(write)
}

pub(crate) fn part_of(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    target.with_file_name(name)
}

/// SHA-256 of a file, hex.
pub(crate) fn sha256(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn open_part(part: &Path, start: u64) -> Result<File, FetchError> {
    let write = |source| FetchError::Write { path: part.to_owned(), source };
    let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(part).map_err(write)?;
    file.set_len(start).map_err(write)?;
    file.seek(SeekFrom::Start(start)).map_err(write)?;
    Ok(file)
}

/// Follows redirects to the answer that has the file, from byte `have` where the server can do that. Gives it with
/// its first byte; `None` where the server has no more than what is there: an earlier try ended after the last byte,
/// before its check.
async fn open(
    client: &HttpClient,
    url: &str,
    token: Option<&str>,
    have: u64,
    expect: &mut Expect,
) -> Result<Option<(http::Response<forebay_upstream::ResponseBody>, u64)>, FetchError> {
    let (mut url, mut have) = (url.to_owned(), have);
    // The token belongs to the hub, never to the storage it redirects to.
    let mut token = token;
    for _ in 0..=REDIRECTS_MAX {
        let bad = || FetchError::BadUrl { url: url.clone() };
        let mut request = Request::get(&url).header(header::USER_AGENT, USER_AGENT);
        if have > 0 {
            request = request.header(header::RANGE, format!("bytes={have}-"));
        }
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(full("")).map_err(|_| bad())?;
        let response = tokio::time::timeout(HEAD_TIMEOUT, client.send(request))
            .await
            .map_err(|_| FetchError::Connect {
                why: format!("no answer within {} s", HEAD_TIMEOUT.as_secs()),
            })?
            .map_err(|error| FetchError::Connect { why: error.detail() })?;
        // The hub names the content's hash on the redirect: the file is verified even where the catalogue has no hash.
        if expect.sha256.is_none()
            && let Some(etag) = response.headers().get("x-linked-etag").and_then(|v| v.to_str().ok())
        {
            let etag = etag.trim_matches('"');
            if etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit()) {
                expect.sha256 = Some(etag.to_owned());
            }
        }
        let status = response.status();
        if status.is_redirection() {
            let location =
                response.headers().get(header::LOCATION).and_then(|v| v.to_str().ok()).ok_or_else(bad)?;
            let next = absolute(&url, location);
            if origin(&next) != origin(&url) {
                token = None;
            }
            url = next;
            continue;
        }
        let range = content_range(response.headers());
        match status {
            StatusCode::RANGE_NOT_SATISFIABLE if have > 0 && range == Some((None, Some(have))) => {
                return Ok(None);
            }
            StatusCode::PARTIAL_CONTENT if matches!(range, Some((Some(start), _)) if start == have) => {
                return Ok(Some((response, have)));
            }
            // What is there doesn't go with what the server has: once more, from the beginning.
            StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PARTIAL_CONTENT if have > 0 => have = 0,
            _ if status.is_success() => return Ok(Some((response, 0))),
            _ => return Err(FetchError::Status { status: status.as_u16(), url }),
        }
    }
    Err(FetchError::Redirects)
}

fn origin(url: &str) -> Option<(String, String)> {
    let uri: http::Uri = url.parse().ok()?;
    Some((uri.scheme_str()?.to_owned(), uri.authority()?.as_str().to_owned()))
}

fn absolute(base: &str, location: &str) -> String {
    match (location.starts_with('/'), origin(base)) {
        (true, Some((scheme, authority))) => format!("{scheme}://{authority}{location}"),
        _ => location.to_owned(),
    }
}

/// First byte and size of `content-range: bytes 5-9/10`, or of `bytes */10`.
fn content_range(headers: &http::HeaderMap) -> Option<(Option<u64>, Option<u64>)> {
    let (range, size) =
        headers.get(header::CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?.split_once('/')?;
    let first = range.split_once('-').and_then(|(first, _)| first.trim().parse().ok());
    Some((first, size.trim().parse().ok()))
}

fn content_length(headers: &http::HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_url_has_no_secret() {
        let check = |url: &str, expect: &str| assert_eq!(shown(url), expect);
        check("https://storage.example/a/b.gguf?signature=s3cret", "https://storage.example/a/b.gguf");
        check("https://me:s3cret@mirror.example/x", "https://mirror.example/x");
        check("https://me:s3cret@mirror.example", "https://mirror.example");
        check("http://127.0.0.1:9/a@b", "http://127.0.0.1:9/a@b");
        check("nonsense", "nonsense");
    }

    #[test]
    fn content_ranges_are_read() {
        let check = |value: &'static str, expect| {
            let headers =
                [(header::CONTENT_RANGE, http::HeaderValue::from_static(value))].into_iter().collect();
            assert_eq!(content_range(&headers), expect, "{value}");
        };
        check("bytes 5-9/10", Some((Some(5), Some(10))));
        check("bytes 5-9/*", Some((Some(5), None)));
        check("bytes */10", Some((None, Some(10))));
        check("lines 5-9/10", None);
        check("bytes", None);
    }
}
