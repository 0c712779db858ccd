//! The model hub: which file to take from a repository, and its URL. Speaks the Hugging Face hub's HTTP API.

use std::time::Duration;

use forebay_upstream::{HttpClient, full};
use http::Request;

use crate::fetch::FetchError;

/// The branch that is taken where no commit is known.
pub(crate) const MAIN: &str = "main";

/// Answer of the file listing at most.
const LISTING_BYTES_MAX: usize = 8 * 1024 * 1024;
const LISTING_TIMEOUT: Duration = Duration::from_secs(30);

/// Quantisations in the order in which one is taken where a repository has several: exact enough first, then small.
const PREFERENCE: &[&str] = &[
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "F16", "BF16",
    "F32",
];

/// Where the hub is and who we are there.
#[derive(Clone)]
pub struct HubConfig {
    /// `https://huggingface.co`, or a mirror of it.
    pub endpoint: String,
    /// For gated repositories.
    pub token: Option<String>,
}

impl Default for HubConfig {
    fn default() -> Self {
        Self { endpoint: "https://huggingface.co".into(), token: None }
    }
}

impl std::fmt::Debug for HubConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = self.token.as_ref().map(|_| "<hidden>");
        f.debug_struct("HubConfig")
            .field("endpoint", &crate::fetch::shown(&self.endpoint))
            .field("token", &token)
            .finish()
    }
}

impl HubConfig {
    /// A repository as people may see it.
    pub(crate) fn source(&self, repo: &str) -> String {
        format!("hub {}/{repo}", crate::fetch::shown(self.endpoint.trim_end_matches('/')))
    }

    pub(crate) fn file_url(&self, repo: &str, revision: &str, file: &str) -> String {
        format!("{}/{repo}/resolve/{revision}/{file}", self.endpoint.trim_end_matches('/'))
    }

    /// What a repository has now.
    pub(crate) async fn list(&self, client: &HttpClient, repo: &str) -> Result<Listing, FetchError> {
        let url = format!("{}/api/models/{repo}?blobs=true", self.endpoint.trim_end_matches('/'));
        let mut request = Request::get(&url).header(http::header::USER_AGENT, crate::fetch::USER_AGENT);
        if let Some(token) = &self.token {
            request = request.header(http::header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(full("")).map_err(|_| FetchError::BadUrl { url: url.clone() })?;
        let answer = client
            .exchange(request, LISTING_BYTES_MAX, LISTING_TIMEOUT)
            .await
            .map_err(|error| FetchError::Connect { why: error.detail() })?;
        if !answer.status.is_success() {
            return Err(FetchError::Status { status: answer.status.as_u16(), url });
        }
        Listing::parse(&answer.body).ok_or_else(|| FetchError::BadListing { repo: repo.to_owned() })
    }
}

/// The files of a repository at one commit.
#[derive(Debug)]
pub(crate) struct Listing {
    /// The commit, 40 hex digits; a mirror may not say it, then [`MAIN`].
    pub revision: String,
    files: Vec<RepoFile>,
}

/// A file of a repository, with what the hub says about it.
#[derive(Debug, Clone, Default)]
pub(crate) struct RepoFile {
    pub path: String,
    pub bytes: Option<u64>,
    /// Of large files only (LFS), hex.
    pub sha256: Option<String>,
}

impl Listing {
    /// `None` where it is not the hub's answer.
    fn parse(body: &[u8]) -> Option<Self> {
        #[derive(serde::Deserialize)]
        struct Answer {
            sha: Option<String>,
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
            size: Option<u64>,
            lfs: Option<Lfs>,
        }
        #[derive(serde::Deserialize)]
        struct Lfs {
            sha256: Option<String>,
        }
        let answer: Answer = serde_json::from_slice(body).ok()?;
        // It becomes part of a URL and of a directory's name.
        let revision = answer.sha.filter(|sha| is_hex(sha, 40)).unwrap_or_else(|| MAIN.to_owned());
        let file = |Sibling { rfilename, size, lfs }: Sibling| {
            let sha256 = lfs.and_then(|lfs| lfs.sha256).filter(|sha| is_hex(sha, 64));
            RepoFile { path: rfilename, bytes: size, sha256 }
        };
        Some(Self { revision, files: answer.siblings.into_iter().map(file).collect() })
    }

    pub(crate) fn find(&self, path: &str) -> Option<&RepoFile> {
        self.files.iter().find(|file| file.path == path)
    }

    pub(crate) fn ggufs(&self) -> Vec<String> {
        self.files.iter().map(|file| &file.path).filter(|path| path.ends_with(".gguf")).cloned().collect()
    }

    /// The GGUF file to take.
    pub(crate) fn best_gguf(&self) -> Option<&RepoFile> {
        let quant = |wanted: &str| {
            self.files.iter().find(|file| {
                let stem = file.path.strip_suffix(".gguf").map(str::to_ascii_uppercase);
                stem.is_some_and(|stem| stem.ends_with(wanted) && !stem.contains("-OF-"))
            })
        };
        PREFERENCE.iter().find_map(|wanted| quant(wanted))
    }
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_supported_file_is_taken() {
        let check = |files: &[&str], expect: Option<&str>| {
            let file = |path: &&str| RepoFile { path: (*path).to_owned(), ..RepoFile::default() };
            let listing = Listing { revision: "main".into(), files: files.iter().map(file).collect() };
            assert_eq!(listing.best_gguf().map(|file| &file.path[..]), expect, "{files:?}");
        };
        check(&["README.md", "m.Q4_0.gguf", "m.Q8_0.gguf"], Some("m.Q8_0.gguf"));
        check(&["m-q4_1.gguf", "m-q2_k.gguf"], Some("m-q4_1.gguf"));
        check(&["m.Q4_K_M.gguf", "m.Q6_K.gguf"], Some("m.Q6_K.gguf"));
        check(&["m.Q2_K.gguf"], None);
        check(&["m-Q8_0-00001-of-00002.gguf"], None);
    }

    #[test]
    fn listings_are_read() {
        let check = |body: &str, expect: Option<(&str, Option<u64>, bool)>| {
            let read = Listing::parse(body.as_bytes()).map(|listing| {
                let file = listing.find("a").cloned().unwrap_or_default();
                (listing.revision, file.bytes, file.sha256.is_some())
            });
            let read = read.as_ref().map(|(revision, bytes, sha)| (revision.as_str(), *bytes, *sha));
            assert_eq!(read, expect, "{body}");
        };
        let (sha, sha256) = ("0a".repeat(20), "0b".repeat(32));
        let lfs =
            format!(r#"{{"rfilename":"a","size":7,"blobId":"x","lfs":{{"sha256":"{sha256}","size":7}}}}"#);
        check(&format!(r#"{{"sha":"{sha}","siblings":[{lfs}]}}"#), Some((&sha, Some(7), true)));
        check(r#"{"siblings":[{"rfilename":"a"}]}"#, Some(("main", None, false)));
        check(r#"{"sha":"../../x","siblings":[{"rfilename":"a","lfs":null}]}"#, Some(("main", None, false)));
        let bad = r#"{"siblings":[{"rfilename":"a","lfs":{"sha256":"../x"}}]}"#;
        check(bad, Some(("main", None, false)));
        check("{}", Some(("main", None, false)));
        check("[]", None);
        check(r#"{"siblings":[{"rfilename":"a","size":-1}]}"#, None);
    }

    #[test]
    fn a_token_is_not_printed() {
        let hub = HubConfig {
            token: Some("hf_secret".into()),
            endpoint: "https://me:hf_secret@hub.example".into(),
        };
        assert!(!format!("{hub:?} {}", hub.source("org/repo")).contains("hf_secret"));
    }
}
