//! A repository of safetensors becomes a directory.

use std::fs;
use std::path::Path;

use forebay_models::{ModelRef, PullError, Quiet};

use super::hub::{Behaviour, Hub};
use super::{Resumed, client, temp};

const INDEX: &str = r#"{"metadata":{},"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors","c":"model-1.safetensors"}}"#;

fn weights(seed: u32) -> Vec<u8> {
    (0..50_000u32).flat_map(|i| (i ^ seed).to_le_bytes()).collect()
}

/// In two shards, with a file that nobody wants and no optional one but two.
async fn sharded() -> Hub {
    let text = |text: &str| text.as_bytes().to_vec();
    Hub::of([
        ("config.json", text("{}"), false),
        ("tokenizer.json", text(r#"{"model":{}}"#), true),
        ("generation_config.json", text(r#"{"temperature":0.5}"#), false),
        ("1_Pooling/config.json", text("{ }"), false),
        ("model.safetensors.index.json", text(INDEX), false),
        ("model-1.safetensors", weights(1), true),
        ("model-2.safetensors", weights(2), true),
        ("pytorch_model.bin", text("no"), true),
        ("README.md", text("no"), false),
    ])
    .await
}

fn repo() -> ModelRef {
    ModelRef::parse("hf:org/repo").expect("a reference")
}

/// Paths of all files below, sorted.
fn files(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("readable") {
        let entry = entry.expect("readable");
        let name = entry.file_name().into_string().expect("UTF-8");
        if entry.path().is_dir() {
            found.extend(files(&entry.path()).iter().map(|below| format!("{name}/{below}")));
        } else {
            found.push(name);
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn what_a_model_needs_is_pulled_once() {
    let hub = sharded().await;
    for tells_sizes in [true, false] {
        hub.change(|repo| {
            repo.tells_sizes = tells_sizes;
            repo.commit = repo.commit.take().filter(|_| tells_sizes);
        });
        let dir = temp();
        let store = hub.store(&dir);
        assert!(store.cached(&repo()).is_none());
        let pulled = store.pull(&client(), &repo(), &Quiet).await.unwrap();
        let expect = [
            "1_Pooling/config.json",
            "config.json",
            "generation_config.json",
            "model-1.safetensors",
            "model-2.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ];
        assert_eq!(files(&pulled.path), expect);
        for name in expect {
            assert_eq!(fs::read(pulled.path.join(name)).unwrap(), hub.content(name), "{name}");
        }
        assert_eq!(pulled.name, "org/repo");
        let asked = hub.count("get ");
        let again = store.pull(&client(), &repo(), &Quiet).await.unwrap();
        assert_eq!((again.path.as_path(), again.source.as_str()), (pulled.path.as_path(), "cache"));
        assert_eq!(store.cached(&repo()), Some(pulled.path));
        assert_eq!(hub.count("get "), asked, "the cache asks nobody");
        let listed: Vec<_> =
            store.list().unwrap().into_iter().map(|model| (model.name, model.complete)).collect();
        assert_eq!(listed, [("hf:org/repo".to_owned(), true)]);
    }
}

#[tokio::test]
async fn one_file_goes_before_an_index_and_gguf_before_both() {
    let (hub, dir) = (sharded().await, temp());
    hub.change(|repo| drop(repo.files.insert("model.safetensors".into(), (weights(0), true))));
    let pulled = hub.store(&dir).pull(&client(), &repo(), &Quiet).await.unwrap();
    let weights: Vec<_> = files(&pulled.path).into_iter().filter(|name| name.starts_with("model")).collect();
    assert_eq!(weights, ["model.safetensors"]);
    hub.change(|repo| drop(repo.files.insert("m.Q4_K_M.gguf".into(), (b"GGUF".to_vec(), true))));
    let pulled = hub.store(&temp()).pull(&client(), &repo(), &Quiet).await.unwrap();
    assert!(pulled.path.ends_with("m.Q4_K_M.gguf"), "{}", pulled.path.display());
}

#[tokio::test]
async fn an_interrupted_pull_goes_on_where_it_was() {
    let (hub, dir) = (sharded().await, temp());
    let store = hub.store(&dir);
    hub.behave(Behaviour::BreakAt(100_000));
    let error = store.pull(&client(), &repo(), &Quiet).await.unwrap_err();
    assert!(error.to_string().contains("broke off at 100000 bytes"), "{error}");
    assert!(store.cached(&repo()).is_none(), "a model that is not whole is none");
    let listed = store.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].name.as_str(), listed[0].complete), ("hf:org/repo", false));

    hub.behave(Behaviour::Whole);
    let resumed = Resumed::default();
    let pulled = store.pull(&client(), &repo(), &resumed).await.unwrap();
    assert_eq!(*resumed.0.lock().unwrap(), [100_000, 0], "the rest of one shard, and the other");
    assert_eq!(fs::read(pulled.path.join("model-1.safetensors")).unwrap(), weights(1));
    for name in ["config.json", "tokenizer.json", "model.safetensors.index.json"] {
        let asked = hub.count(&format!("get /org/repo/resolve/{}/{name} ", "c0".repeat(20)));
        assert_eq!(asked, 1, "{name}");
    }
    assert_eq!(fs::read_dir(pulled.path.parent().unwrap()).unwrap().count(), 2, "the lock and the model");
}

#[tokio::test]
async fn nothing_of_another_commit_is_mixed_in() {
    // A mirror that names no commit may have another one each time.
    for commits in [[Some("c0".repeat(20)), Some("d1".repeat(20))], [None, None]] {
        let [first, second] = commits;
        let (hub, dir) = (sharded().await, temp());
        let store = hub.store(&dir);
        hub.change(|repo| {
            repo.behaviour = Behaviour::BreakAt(100_000);
            repo.tells_sizes = first.is_some();
            repo.commit = first;
        });
        store.pull(&client(), &repo(), &Quiet).await.unwrap_err();
        hub.change(|repo| {
            repo.behaviour = Behaviour::Whole;
            repo.commit = second;
            repo.files.insert("config.json".into(), (b"[]".to_vec(), false));
            repo.files.insert("model-1.safetensors".into(), (weights(9), true));
        });
        let pulled = store.pull(&client(), &repo(), &Quiet).await.unwrap();
        assert_eq!(fs::read(pulled.path.join("config.json")).unwrap(), b"[]");
        assert_eq!(fs::read(pulled.path.join("model-1.safetensors")).unwrap(), weights(9));
        let beside = fs::read_dir(pulled.path.parent().unwrap()).unwrap().count();
        assert_eq!(beside, 2, "the lock and the model");
    }
}

#[tokio::test]
async fn a_damaged_shard_is_no_model() {
    let (hub, dir) = (sharded().await, temp());
    let store = hub.store(&dir);
    hub.behave(Behaviour::Corrupt);
    let error = store.pull(&client(), &repo(), &Quiet).await.unwrap_err();
    assert!(error.to_string().contains("SHA-256"), "{error}");
    assert!(store.cached(&repo()).is_none());
    hub.behave(Behaviour::Whole);
    assert!(store.pull(&client(), &repo(), &Quiet).await.is_ok());
}

#[tokio::test]
async fn a_private_repository_needs_its_token() {
    let (hub, dir) = (sharded().await, temp());
    hub.change(|repo| repo.token = Some("hf_other".into()));
    let error = hub.store(&dir).pull(&client(), &repo(), &Quiet).await.unwrap_err().to_string();
    assert!(error.contains("401") && error.contains("HF_TOKEN"), "{error}");
    hub.change(|repo| repo.token = Some("hf_secret".into()));
    assert!(hub.store(&dir).pull(&client(), &repo(), &Quiet).await.is_ok());
}

#[tokio::test]
async fn what_can_not_be_served_is_not_fetched() {
    let check = async |change: &dyn Fn(&mut super::hub::Repo), expect: &str| {
        let (hub, dir) = (sharded().await, temp());
        hub.change(|repo| change(repo));
        let error = hub.store(&dir).pull(&client(), &repo(), &Quiet).await.unwrap_err();
        assert!(matches!(error, PullError::AllSources { .. }));
        assert!(error.to_string().contains(expect), "{error}");
        assert_eq!(hub.count("get /storage/model-"), 0, "no weights were fetched");
        assert!(hub.store(&dir).cached(&repo()).is_none());
        // Nothing was written but below the store's directory of this repository.
        let outside = files(dir.path()).into_iter().filter(|path| !path.starts_with("hub/org--repo/"));
        assert_eq!(outside.collect::<Vec<_>>(), [] as [String; 0]);
    };
    let remove = |name: &'static str| move |repo: &mut super::hub::Repo| drop(repo.files.remove(name));
    check(
        &remove("config.json"),
        "no GGUF file of a supported type, and no safetensors model: there is no config.json",
    )
    .await;
    check(&remove("tokenizer.json"), "there is no tokenizer.json").await;
    check(&remove("model.safetensors.index.json"), "there is no model.safetensors").await;
    check(
        &remove("model-2.safetensors"),
        "it names `model-2.safetensors`, which the repository does not have",
    )
    .await;
    let index = |text: String| {
        move |repo: &mut super::hub::Repo| {
            let file = (text.clone().into_bytes(), false);
            drop(repo.files.insert("model.safetensors.index.json".into(), file));
        }
    };
    let names = |name: &str| index(format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#));
    for name in
        ["../../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".x.safetensors", "x.bin", ""]
    {
        check(&names(name), &format!("it names `{name}`, which is not the name of a safetensors file")).await;
    }
    check(&index("{".into()), "`model.safetensors.index.json` of `org/repo`: it can't be read").await;
    check(&index(r#"{"weight_map":{}}"#.into()), "it names 0 files, and 1 to 1024 can be used").await;
    let many: Vec<String> = (0..1025).map(|n| format!(r#""t{n}":"s{n}.safetensors""#)).collect();
    let many = format!(r#"{{"weight_map":{{{}}}}}"#, many.join(","));
    check(&index(many), "it names 1025 files").await;
    // The limit is for whatever the hub says, and before anything is read.
    check(
        &|repo| {
            repo.tells_sizes = true;
            repo.announce = Some(("tokenizer.json".into(), 300 << 20));
        },
        "/tokenizer.json has more than 268435456 bytes",
    )
    .await;
}
