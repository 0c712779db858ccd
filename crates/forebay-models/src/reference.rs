//! How a user names a model: a known name, a path of a file or a directory, or `hf:ORG/REPO[/FILE]`.

use std::path::PathBuf;

use crate::catalogue::{self, CATALOGUE, KnownModel};

#[derive(Debug, Clone)]
pub enum ModelRef {
    Known(&'static KnownModel),
    Path(PathBuf),
    Hub { repo: String, file: Option<String> },
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReferenceError {
    #[error(
        "unknown model `{name}`{}; known are {}; a file or a directory is named by its path (`./{name}.gguf`, `./{name}`), a hub repository as \
         `hf:ORG/REPO`", suggestion(name), CATALOGUE.iter().map(|m| format!("`{}`", m.name)).collect::<Vec<_>>().join(", ")
    )]
    Unknown { name: String },
    #[error("`{text}` is not a hub reference: write `hf:ORG/REPO` or `hf:ORG/REPO/FILE.gguf`")]
    BadHub { text: String },
    #[error("the model's name is empty")]
    Empty,
}

impl ModelRef {
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if let Some(hub) = text.strip_prefix("hf:") {
            return parse_hub(text, hub);
        }
        if let Some(known) = catalogue::find(text) {
            return Ok(Self::Known(known));
        }
        let looks_like_a_path =
            text.contains(std::path::MAIN_SEPARATOR) || text.starts_with('.') || text.ends_with(".gguf");
        if looks_like_a_path {
            return Ok(Self::Path(text.into()));
        }
        Err(ReferenceError::Unknown { name: text.to_owned() })
    }

    /// What the model is called where nobody says otherwise: its catalogue name, the name of its file (without
    /// `.gguf`) or directory, the repository.
    pub fn default_name(&self) -> String {
        match self {
            Self::Known(known) => known.name.to_owned(),
            Self::Path(path) => {
                // A directory may be called `SmolLM2-1.7B`.
                let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
                name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
            }
            Self::Hub { repo, .. } => repo.clone(),
        }
    }
}

/// The catalogue's name that a misspelt one is closest to.
fn suggestion(name: &str) -> String {
    let name = name.to_ascii_lowercase();
    let close = CATALOGUE.iter().map(|model| (strsim::jaro_winkler(&name, model.name), model.name));
    match close.max_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((likeness, known)) if likeness > 0.85 => format!(" (did you mean `{known}`?)"),
        _ => String::new(),
    }
}

fn parse_hub(text: &str, hub: &str) -> Result<ModelRef, ReferenceError> {
    let bad = || ReferenceError::BadHub { text: text.to_owned() };
    let mut parts = hub.splitn(3, '/');
    let (org, repo, file) =
        (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next());
    let plain = is_plain_name;
    // `--` is our `/` in names of directories, and no repository of the hub has it.
    if !plain(org)
        || !plain(repo)
        || hub.split('/').take(2).any(|part| part.contains("--"))
        || file.is_some_and(|file| !file.split('/').all(plain) || !file.ends_with(".gguf"))
    {
        return Err(bad());
    }
    Ok(ModelRef::Hub { repo: format!("{org}/{repo}"), file: file.map(str::to_owned) })
}

/// Whether a part of a name may become part of a URL and of a path: nothing but the hub's own alphabet, and no `..`.
pub(crate) fn is_plain_name(part: &str) -> bool {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !part.is_empty() && part.len() <= 128 && part.chars().all(ok) && !part.starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_told_apart() {
        let check = |text: &str, expect: &str| {
            let got = match ModelRef::parse(text) {
                Ok(ModelRef::Known(known)) => format!("known {}", known.name),
                Ok(ModelRef::Path(path)) => format!("path {}", path.display()),
                Ok(ModelRef::Hub { repo, file }) => format!("hub {repo} {}", file.unwrap_or_default()),
                Err(ReferenceError::Unknown { .. }) => "unknown".into(),
                Err(error) => error.to_string(),
            };
            assert_eq!(got, expect, "{text}");
        };
        check("SmolLM2-135M-Instruct", "known smollm2-135m-instruct");
        check("./a.gguf", "path ./a.gguf");
        check("a.gguf", "path a.gguf");
        check("/models/a", "path /models/a");
        check("hf:Org/Repo-GGUF", "hub Org/Repo-GGUF ");
        check("hf:Org/Repo/sub/x.Q8_0.gguf", "hub Org/Repo sub/x.Q8_0.gguf");
        check("gpt-4o", "unknown");
        check("hf:Org", "`hf:Org` is not a hub reference: write `hf:ORG/REPO` or `hf:ORG/REPO/FILE.gguf`");
        check(
            "hf:../etc/passwd",
            "`hf:../etc/passwd` is not a hub reference: write `hf:ORG/REPO` or `hf:ORG/REPO/FILE.gguf`",
        );
        check(
            "hf:a--b/c",
            "`hf:a--b/c` is not a hub reference: write `hf:ORG/REPO` or `hf:ORG/REPO/FILE.gguf`",
        );
        check("hf:a/b/c--d.gguf", "hub a/b c--d.gguf");
        check(
            "hf:a/b/model.safetensors",
            "`hf:a/b/model.safetensors` is not a hub reference: write `hf:ORG/REPO` or `hf:ORG/REPO/FILE.gguf`",
        );
        check("  ", "the model's name is empty");
    }

    #[test]
    fn a_path_is_called_by_its_last_part() {
        let check = |text: &str, expect: &str| {
            assert_eq!(ModelRef::parse(text).unwrap().default_name(), expect);
        };
        check("/models/a.Q4_1.gguf", "a.Q4_1");
        check("/models/SmolLM2-1.7B", "SmolLM2-1.7B");
        check("./SmolLM2-1.7B/", "SmolLM2-1.7B");
    }

    #[test]
    fn a_misspelt_name_gets_a_suggestion() {
        let error = |text: &str| ModelRef::parse(text).unwrap_err().to_string();
        assert!(error("smollm2-135m-instuct").contains("did you mean `smollm2-135m-instruct`?"));
        assert!(!error("gpt-4o").contains("did you mean"));
    }
}
