//! The model hub: which file to take from a repository, and its URL. Speaks the Hugging Face hub's HTTP API.

use std::time::Duration;

use forebay_upstream::{HttpClient, full};
use http::Request;

use crate::fetch::FetchError;

/// Answer of the file listing at most.
const LISTING_BYTES_MAX: usize = 8 * 1024 * 1024;
const LISTING_TIMEOUT: Duration = Duration::from_secs(30);

/// Quantisations in the order in which one is taken where a repository has several: exact enough first, then small.
const PREFERENCE: &[&str] = &["Q8_0", "Q4_1", "Q4_0", "F16", "BF16", "F32"];

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

    /// The file to take from a repository.
    pub(crate) async fn choose_file(&self, client: &HttpClient, repo: &str) -> Result<String, FetchError> {
        let url = format!("{}/api/models/{repo}", self.endpoint.trim_end_matches('/'));
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
        #[derive(serde::Deserialize)]
        struct Listing {
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let listing: Listing = serde_json::from_slice(&answer.body)
            .map_err(|_| FetchError::BadListing { repo: repo.to_owned() })?;
        let files: Vec<String> = listing.siblings.into_iter().map(|s| s.rfilename).collect();
        choose(&files).ok_or_else(|| FetchError::NoUsableFile { repo: repo.to_owned(), files: ggufs(&files) })
    }
}

fn ggufs(files: &[String]) -> Vec<String> {
    files.iter().filter(|f| f.ends_with(".gguf")).cloned().collect()
}

fn choose(files: &[String]) -> Option<String> {
    let ggufs = ggufs(files);
    let quant = |wanted: &str| {
        ggufs.iter().find(|file| {
            let stem = file.trim_end_matches(".gguf").to_ascii_uppercase();
            stem.ends_with(wanted) && !stem.contains("-OF-")
        })
    };
    PREFERENCE.iter().find_map(|wanted| quant(wanted)).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_supported_file_is_taken() {
        let check = |files: &[&str], expect: Option<&str>| {
            let files: Vec<String> = files.iter().map(|f| (*f).to_owned()).collect();
            assert_eq!(choose(&files).as_deref(), expect, "{files:?}");
        };
        check(&["README.md", "m.Q4_0.gguf", "m.Q8_0.gguf"], Some("m.Q8_0.gguf"));
        check(&["m-q4_1.gguf", "m-q2_k.gguf"], Some("m-q4_1.gguf"));
        check(&["m.Q2_K.gguf"], None);
        check(&["m-Q8_0-00001-of-00002.gguf"], None);
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
