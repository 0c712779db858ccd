//! `forebay model pull|list`.

use anyhow::Context;
use forebay_app::model::store;
use forebay_config::{ByteSize, RealEnvironment};
use forebay_models::{CATALOGUE, ModelRef};
use forebay_upstream::{ClientConfig, HttpClient};

use crate::cli::Model;
use crate::progress::PullProgress;

pub(crate) fn run(command: &Model) -> anyhow::Result<()> {
    match command {
        Model::Pull { model, print_path } => pull(model, *print_path),
        Model::List { json } => list(*json),
    }
}

fn pull(model: &str, print_path: bool) -> anyhow::Result<()> {
    let reference = ModelRef::parse(model)?;
    let store = store(&RealEnvironment)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let progress = PullProgress::default();
    let client = HttpClient::new(ClientConfig::default());
    let pulled = runtime.block_on(store.pull_verified(&client, &reference, &progress));
    progress.finish();
    let pulled = pulled?;
    if print_path {
        crate::out::line!("{}", pulled.path.display());
    } else {
        crate::out::line!("{} is at {} ({})", pulled.name, pulled.path.display(), pulled.source);
        if let ModelRef::Known(known) = &reference {
            crate::out::line!("licence: {}", known.licence);
        }
    }
    Ok(())
}

fn list(json: bool) -> anyhow::Result<()> {
    let store = store(&RealEnvironment)?;
    let cached = store.list().with_context(|| format!("can't list {}", store.dir().display()))?;
    if json {
        let known: Vec<_> = CATALOGUE
            .iter()
            .map(|m| serde_json::json!({"name": m.name, "file": m.file, "bytes": m.bytes, "licence": m.licence}))
            .collect();
        crate::out::line!(
            "{}",
            serde_json::json!({"directory": store.dir(), "cached": cached, "known": known})
        );
        return Ok(());
    }
    crate::out::line!("{:<40} {:>12}  in {}", "MODEL", "SIZE", store.dir().display());
    for model in &cached {
        let state = if model.complete { "" } else { "  (download not finished: pull it again)" };
        crate::out::line!("{:<40} {:>12}{state}", model.name, ByteSize::new(model.bytes).to_string());
    }
    for known in CATALOGUE.iter().filter(|known| cached.iter().all(|c| c.name != known.name)) {
        crate::out::line!(
            "{:<40} {:>12}  (not fetched; {})",
            known.name,
            ByteSize::new(known.bytes).to_string(),
            known.licence
        );
    }
    Ok(())
}
