//! A model that is a directory of a repository: configuration, tokenizer and safetensors, all of one commit.
//!
//! Files are put together in a directory beside the final one, which is renamed when the last file is verified. A pull
//! that was interrupted goes on there, as long as the repository is at the same commit.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use forebay_upstream::HttpClient;

use crate::fetch::{Expect, FetchError, SMALL_BYTES_MAX, WEIGHTS_BYTES_MAX, download};
use crate::hub::{HubConfig, Listing, MAIN, RepoFile};
use crate::reference::is_plain_name;
use crate::store::{CONFIG_FILE, Progress, has_size, make_directory, make_parent};

const TOKENIZER_FILE: &str = "tokenizer.json";
const WEIGHTS_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// What else the engine reads, where the repository has it.
const OPTIONAL: [&str; 7] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
];
/// As many as the engine opens.
const SHARDS_MAX: usize = 1024;
/// End of the name of a directory that is not complete; before it stands the commit.
pub(crate) const UNFINISHED: &str = ".part";

/// What the repository lacks to be served from safetensors.
pub(crate) fn lacking(listing: &Listing) -> Vec<&'static str> {
    let has = |name: &&str| listing.find(name).is_some();
    let mut lacking: Vec<_> = [CONFIG_FILE, TOKENIZER_FILE].into_iter().filter(|name| !has(name)).collect();
    if ![WEIGHTS_FILE, INDEX_FILE].iter().any(has) {
        lacking.push(WEIGHTS_FILE);
    }
    lacking
}

/// Pulls the repository's model into `target`, which is not there.
///
/// Cancellation: guarded; what has come stays and the next call goes on.
pub(crate) async fn pull(
    client: &HttpClient,
    hub: &HubConfig,
    repo: &str,
    listing: &Listing,
    target: &Path,
    progress: &dyn Progress,
) -> Result<(), FetchError> {
    let staging = target.with_file_name(format!("{}{UNFINISHED}", listing.revision));
    // Where no commit is known, what an earlier try brought may be of another one.
    remove_others(target, (listing.revision != MAIN).then_some(&staging))?;
    make_directory(&staging)?;
    let fetch = Fetch { client, hub, repo, listing, staging: &staging, progress };
    let small = [CONFIG_FILE, TOKENIZER_FILE].into_iter().chain(OPTIONAL);
    for name in small.filter(|name| listing.find(name).is_some()) {
        fetch.file(name, SMALL_BYTES_MAX).await?;
    }
    // As the engine and transformers do: an index counts only where there is no single file.
    if listing.find(WEIGHTS_FILE).is_some() {
        fetch.file(WEIGHTS_FILE, WEIGHTS_BYTES_MAX).await?;
    } else {
        fetch.file(INDEX_FILE, SMALL_BYTES_MAX).await?;
        let shards = shards(&fetch.read(INDEX_FILE)?, listing)
            .map_err(|why| FetchError::BadIndex { repo: repo.to_owned(), why })?;
        for shard in &shards {
            fetch.file(shard, WEIGHTS_BYTES_MAX).await?;
        }
    }
    fs::rename(&staging, target).map_err(|source| FetchError::Write { path: target.to_owned(), source })
}

struct Fetch<'a> {
    client: &'a HttpClient,
    hub: &'a HubConfig,
    repo: &'a str,
    listing: &'a Listing,
    staging: &'a Path,
    progress: &'a dyn Progress,
}

impl Fetch<'_> {
    /// Gets a file, unless an earlier try did: there, a file has its name only when it is verified.
    async fn file(&self, name: &str, bytes_max: u64) -> Result<(), FetchError> {
        let RepoFile { bytes, sha256, .. } = self.listing.find(name).cloned().unwrap_or_default();
        let target = self.staging.join(name);
        if bytes.map_or(target.is_file(), |bytes| has_size(&target, bytes)) {
            return Ok(());
        }
        make_parent(&target)?;
        self.progress.source(&format!("{}/{name}", self.hub.source(self.repo)));
        let url = self.hub.file_url(self.repo, &self.listing.revision, name);
        let expect = Expect { bytes, bytes_max, sha256 };
        download(self.client, &url, self.hub.token.as_deref(), &target, expect, self.progress).await
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, FetchError> {
        let path = self.staging.join(name);
        fs::read(&path).map_err(|source| FetchError::Write { path, source })
    }
}

/// The files that an index names, each once. They become parts of paths and URLs, so they must be plain names.
fn shards(index: &[u8], listing: &Listing) -> Result<BTreeSet<String>, IndexError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index)?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    if shards.is_empty() || shards.len() > SHARDS_MAX {
        return Err(IndexError::Count { shards: shards.len() });
    }
    for shard in &shards {
        if !is_plain_name(shard) || !shard.ends_with(".safetensors") {
            return Err(IndexError::Name { name: shard.clone() });
        }
        if listing.find(shard).is_none() {
            return Err(IndexError::NotThere { name: shard.clone() });
        }
    }
    Ok(shards)
}

/// What is wrong with a repository's `model.safetensors.index.json`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IndexError {
    #[error("it can't be read: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it names {shards} files, and 1 to {SHARDS_MAX} can be used")]
    Count { shards: usize },
    #[error("it names `{name}`, which is not the name of a safetensors file beside it")]
    Name { name: String },
    #[error("it names `{name}`, which the repository does not have")]
    NotThere { name: String },
}

/// What is of another commit, nothing of which may come into this one, and a `target` that is no model.
fn remove_others(target: &Path, keep: Option<&PathBuf>) -> Result<(), FetchError> {
    let beside = target.parent().and_then(|dir| fs::read_dir(dir).ok());
    for path in beside.into_iter().flatten().flatten().map(|entry| entry.path()) {
        let is_unfinished = path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(UNFINISHED));
        // What has no configuration is no model, whatever it is called.
        let stale = is_unfinished && Some(&path) != keep || path == target;
        if stale && path.is_dir() {
            fs::remove_dir_all(&path).map_err(|source| FetchError::Write { path, source })?;
        }
    }
    Ok(())
}
